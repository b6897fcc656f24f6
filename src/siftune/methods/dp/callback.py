"""Differential privacy in siftune's own Trainer: its rows, its clipping, its noise, and its place in checkpoints.

It is no public callback. In another Trainer rows are shuffled and not drawn, and the loss is a mean over the tokens of
a batch, in which rows depend on each other: neither can be put right from a callback, so nothing could be promised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from siftune.base.errors import RecipeError
from siftune.methods.dp.accounting import spent
from siftune.methods.dp.driver import PrivateGradients
from siftune.methods.dp.mechanism import Mechanism
from siftune.methods.dp.sampling import PoissonBatches, Secret, collate_any, parts
from siftune.methods.host.callback import LogLines, calling_trainer, saved_state
from siftune.methods.host.spread import refuse_wrappers


class DP(TrainerCallback, ExportableState):  # type: ignore[misc]
    """What a Trainer needs of a private run, at most so many rows in a pass; it stands behind choices of layers."""

    def __init__(self, mechanism: Mechanism, most: int, secret: Secret | None = None) -> None:
        self.mechanism = mechanism
        self._most = most
        self._secret = secret or Secret()
        self._gradients: PrivateGradients | None = None
        self._steps = 0
        self._lines = LogLines("dp", self._figures)

    def _figures(self) -> dict[str, float]:
        """ε so far, for the log; nothing where the accountant cannot tell, as of next to no noise."""
        try:
            return {"epsilon": spent(self.mechanism, self._steps)}
        except (MemoryError, OverflowError, RuntimeError, ValueError):
            return {}

    def loader(self, dataset: Any, collate: Callable[[list[Any]], Mapping[str, Tensor]]) -> DataLoader[Any]:
        """Batches of whole steps, the rows of each drawn by themselves; a batch may have none."""
        batches = PoissonBatches(len(dataset), self.mechanism.rate, self._secret)
        return DataLoader(dataset, batch_sampler=batches, collate_fn=partial(collate_any, collate, dataset))

    def parts(self, batch: Mapping[str, Tensor]) -> Sequence[dict[str, Tensor]]:
        """A step's batch in forward passes."""
        return parts(batch, self._most)

    def release(self, step: int) -> None:
        """Put noise on a step's gradients; see `PrivateGradients.release`."""
        assert self._gradients is not None
        self._gradients.release(step)

    def remove(self) -> None:
        """Take everything off model and Trainer: needed only where training ended in an exception."""
        self._lines.remove()
        if self._gradients is not None:
            self._gradients.remove()

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints: the numbers, so that no other noise is counted on; not the secret."""
        return {"args": {}, "attributes": {"_resumed": asdict(self.mechanism)}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to clip; see `Secret.seed_dropout` for what is done to torch's own generators."""
        self.remove()
        refuse_wrappers(args, kwargs["model"])
        if state.global_step:
            _refuse_other(saved_state(state, type(self).__name__), asdict(self.mechanism))
        self._gradients = PrivateGradients(kwargs["model"], self.mechanism, self._secret)
        self._secret.seed_dropout(state.global_step)
        self._lines.begin(calling_trainer(self))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note how many steps have spent of the promise: the log tells their ε."""
        self._steps = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was, but for what was trained."""
        self.remove()


def _refuse_other(saved: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> None:
    """Refuse to go on from steps whose noise was another: ε would be of neither run."""
    if saved is None:
        raise RecipeError(
            "the checkpoint is of a run without dp_epsilon, so that its steps had no noise and their ε cannot be told: "
            "train anew in another folder with --out, or go on without dp_epsilon"
        )
    for name, value in asked.items():
        if saved.get(name) != value:
            raise RecipeError(
                f"the checkpoint is of a private run with {name} = {saved.get(name)}, this one has {value}, and ε is "
                "counted for one kind of step: go on with the settings of that run, steps and rows among them, or "
                "train anew in another folder with --out"
            )
