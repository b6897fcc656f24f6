"""The rivals that keep some rows of a batch: a Trainer that trains on those alone, and the rules that choose them.

The gradient of a step is that of the mean loss over the labels of the rows that are kept. A batch of which none is kept
is skipped: there are no gradients, so that the optimizer leaves every parameter as it is.

Rules, B rows in a batch and K kept:

    target              the clean rows of the target, known from the making of the pool: the ceiling
    small-excess        the K rows of smallest mean token loss minus that of the base, adapters off
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lab.pays.followed import Followed
from lab.pays.measure import row_losses
from siftune.base.errors import RecipeError
from siftune.methods.dp.driver import row_loss
from siftune.methods.options import count_of
from siftune.models.loss import label_positions, logits_at
from siftune.train.trainer import SiftTrainer

Record = dict[str, Any]
Batch = Mapping[str, Tensor]

_RULES = ("target", "small-excess")


class Book:
    """Finds the rows of a batch again by their tokens.

    Args:
        data: Tokenised rows.
        rows: What they were made of; rows of the same tokens stand for one another.
    """

    def __init__(self, data: Any, rows: Sequence[Record]) -> None:
        self._rows = dict(zip(map(tuple, data["input_ids"]), rows, strict=True))

    def rows(self, batch: Batch) -> list[Record]:
        """The rows of a batch, in its order."""
        pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        return [self._rows[tuple(ids[seen].tolist())] for ids, seen in pairs]


@dataclass
class Keep:
    """A rule.

    Attributes:
        name: One of the rules above.
        select: K, a count or a share; of no account for "target".
    """

    name: str
    select: int | float = 0.25

    def __post_init__(self) -> None:
        if self.name not in _RULES:
            raise RecipeError(f"there is no rule {self.name!r} to keep rows; use {' or '.join(_RULES)}")

    def __call__(self, model: nn.Module, batch: Batch, rows: Sequence[Record]) -> Tensor:
        """Choose rows; (K,) int64, ascending, possibly none."""
        if self.name == "target":
            return torch.tensor([place for place, row in enumerate(rows) if row["group"] in ("target", "known")]).long()
        count = count_of(self.select, len(rows))
        return excess(model, batch).cpu().topk(count, largest=False).indices.sort().values


def excess(model: nn.Module, batch: Batch) -> Tensor:
    """Mean token loss of every row minus that of the base, which is the model with its adapters off; (B,)."""
    with model.disable_adapter():
        base_B = row_losses(model, batch)
    return row_losses(model, batch) - base_B


def rows_of(batch: Batch, kept_K: Tensor) -> dict[str, Tensor]:
    """Some rows of a batch, cut to the longest of them."""
    longest = int(batch["attention_mask"][kept_K].sum(1).max())
    return {name: values[kept_K, :longest] for name, values in batch.items()}


class SubsetTrainer(SiftTrainer):
    """siftune's Trainer, which keeps rows by a rule where there is one, and notes which rows each batch had.

    Attributes:
        book: Tells the rows of a batch.
        followed: Counts them.
        keep: The rule; None where all rows are trained on, or siftune's methods choose.
        seen: Rows of the last batch.
        loss: Another loss than siftune's: "rows", the mean over rows of each row's mean.
    """

    book: Book
    followed: Followed
    keep: Keep | None
    seen: Sequence[Record]
    loss: str | None = None

    @classmethod
    def take_over(cls, trainer: SiftTrainer, book: Book, followed: Followed, keep: Keep | None) -> "SubsetTrainer":
        """Turn a Trainer that is set up into one that keeps rows by a rule; all else stays as it is.

        Raises:
            RecipeError: Gradients are accumulated: how many labels are kept is not known before the last batch.
        """
        if keep is not None and trainer.args.gradient_accumulation_steps > 1:
            raise RecipeError("rows are kept within a batch: leave accumulate at 1, or leave keep out")
        trainer.__class__ = cls
        trainer.book, trainer.followed, trainer.keep, trainer.seen = book, followed, keep, ()
        return trainer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Train on the rows that are kept, as if the batch had no others."""
        batch = self._prepare_inputs(inputs)
        self.seen = self.book.rows(batch)
        self.followed.see(self.state.global_step, self.seen)
        if self.keep is None:
            return super().training_step(model, batch, num_items_in_batch)
        kept_K = self.keep(model, batch, self.seen)
        self.followed.follow(self.state.global_step, None, [self.seen[place] for place in kept_K.tolist()])
        if not len(kept_K):
            return torch.zeros((), device=batch["labels"].device)
        part = rows_of(batch, kept_K.to(batch["labels"].device))
        return super().training_step(model, part, label_positions(part["labels"]).sum())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss that siftune takes, or another."""
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with logits_at(model, label_positions(inputs["labels"])):
            logits_1NV = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return row_loss(logits_1NV, inputs["labels"]) / len(inputs["labels"])
