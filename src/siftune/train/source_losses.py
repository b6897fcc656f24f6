"""Losses by source in a run's log: `loss/web`, and `eval_loss/web` for held-out rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.ranks import columns_of_ranks
from siftune.base.text import one_line
from siftune.data.rows import Row
from siftune.data.target import source_or_file
from siftune.train.trainer import SiftTrainer

_MOST = 12  # sources in a line of the log, those of the most rows


class SourceLosses(TrainerCallback):  # type: ignore[misc]
    """Adds the losses of each source to the log, in nats per label token, over the rows of all ranks.

    A source is a row's column `source`, or its file. Rows of one source have no further losses.

    Args:
        trainer: The Trainer, whose losses are read.
        rows: Training and held-out rows, by "train" and "eval".
    """

    def __init__(self, trainer: SiftTrainer, rows: Mapping[str, Sequence[Row]]) -> None:
        self._trainer = trainer
        self._sources = {name: _names(rows.get(name, ())) for name in ("train", "eval")}
        self._batches: list[tuple[Sequence[int], Tensor]] = []  # numbers and losses of rows since the last line

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the losses of a batch before the last of its step, on their device: a copy would wait for them."""
        if self._sources["train"] and self._trainer.row_losses is not None:
            self._batches.append((self._trainer.rows, self._trainer.row_losses))

    on_pre_optimizer_step = on_substep_end  # the last batch of a step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Extend a line, and its copy in the Trainer's history."""
        logs: dict[str, Any] = kwargs["logs"]
        figures: dict[str, float] = {}
        if "loss" in logs:
            figures = self._means("train", "loss", self._visited(), args)
        elif "eval_loss" in logs:
            figures = self._means("eval", "eval_loss", self._trainer.held_out_losses(), args)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def _visited(self) -> NDArray[np.float64]:
        """Number, mean loss and label tokens of the rows since the last line, (3, V)."""
        batches, self._batches = self._batches, []
        if not batches:
            return np.zeros((3, 0))
        numbers, losses = zip(*batches, strict=True)
        return np.concatenate([np.concatenate(numbers)[None], torch.cat(losses, 1).cpu().double().numpy()])

    def _means(self, part: str, key: str, rows_3V: NDArray[Any], args: TrainingArguments) -> dict[str, float]:
        """Mean loss of each source, by its key in the log.

        Args:
            part: "train" or "eval".
            key: What the keys begin with.
            rows_3V: Number, mean loss and label tokens of rows on this rank.
            args: With the device.
        """
        names = self._sources[part]
        if not names:
            return {}
        row_V, loss_V, tokens_V = columns_of_ranks(torch.from_numpy(rows_3V).double(), args.device).numpy()
        if part == "eval":  # ranks may share rows, so that all have as many
            _, first = np.unique(row_V, return_index=True)
            row_V, loss_V, tokens_V = row_V[first], loss_V[first], tokens_V[first]
        sums: dict[str, list[float]] = {}
        for row, loss, tokens in zip(row_V.astype(int), loss_V, tokens_V, strict=True):
            if np.isfinite(loss):
                total = sums.setdefault(names[row], [0.0, 0.0])
                total[0] += loss * tokens
                total[1] += tokens
        return {f"{key}/{name}": round(sums[name][0] / sums[name][1], 4) for name in sorted(sums) if name}


def _names(rows: Sequence[Row]) -> list[str]:
    """Source of each row, "" for those of few rows; empty if all rows are of one source."""
    names = [one_line(name) for name in source_or_file(rows)]
    largest = [name for name, _ in Counter(names).most_common(_MOST)]
    return [name if name in largest else "" for name in names] if len(largest) > 1 else []
