"""Which rows a Trainer's batches hold: numbers that go with the rows from the data set into the batch.

No Trainer tells a callback what is in a batch. So the rows that its loader reads carry their numbers in the data set
(`Numbered`), the collator puts these into the batch (`NumberingCollator`), and where the Trainer begins to train on the
batch they are read and taken out again (`RowNumbers`), before anything that belongs to the Trainer or the model sees
them. Shuffling, workers, ranks and resuming change nothing about that. siftune's own batches have numbers already.

A batch has numbers only where row i of it is row i of what the collator was given: its tokens are compared. Packed and
padding-free batches, pairs, and batches that are generated have none.

Shapes: B rows of a batch.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from siftune.data.batches import ROW, Collator

_KEY = "siftune_row"  # in a batch, between the collator and the Trainer


class NumberedRow(NamedTuple):
    """A row and its number in the data set."""

    number: int
    row: Any


class Numbered:
    """A data set, indexed by row, of which every row comes with its number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> NumberedRow:
        return NumberedRow(int(index), self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[NumberedRow]:
        """Read a batch at once, where the data set can."""
        together = getattr(self.dataset, "__getitems__", None)
        rows = together(indices) if together is not None else [self.dataset[index] for index in indices]
        return [NumberedRow(int(index), row) for index, row in zip(indices, rows, strict=True)]


class NumberingCollator:
    """Puts the numbers of its rows into a batch, where each row of the batch is one of them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[NumberedRow]) -> Any:
        """Make a batch, with numbers or without."""
        batch = self.collate([each.row for each in rows])
        if isinstance(batch, MutableMapping) and self._alike([each.row for each in rows], batch):
            batch[_KEY] = torch.tensor([each.number for each in rows])
        return batch

    @staticmethod
    def _alike(rows: Sequence[Any], batch: Mapping[str, Any]) -> bool:
        """Whether row i of a batch is the i-th of the rows: it has its tokens, or as many as are left of them."""
        ids_BT, mask_BT = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(ids_BT, Tensor) or len(ids_BT) != len(rows):
            return False
        masks = [...] * len(rows) if mask_BT is None else mask_BT.bool().cpu().numpy()
        return all(map(_same, rows, ids_BT.cpu().numpy(), masks))


def _same(row: Any, ids_T: Any, mask_T: Any) -> bool:
    """Whether a row of a batch begins or ends as it did before; a row of text, which has no tokens yet, passes."""
    given = row.get("input_ids") if isinstance(row, Mapping) else None
    if given is None:
        return True
    own, found = np.asarray(given), ids_T[mask_T]
    kept = min(len(own), len(found))
    return kept > 0 and (np.array_equal(own[:kept], found[:kept]) or np.array_equal(own[-kept:], found[-kept:]))


class RowNumbers:
    """Tells which rows of the training set are in the batch that a Trainer trains on.

    `row_numbers` gives a Trainer's; whoever takes it lets go by `release`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.rows: Tensor | None = None  # (B,) int64, numbers of the rows of the last batch that was trained on
        self.labels: Tensor | None = None  # (B, T) int64, its labels
        self.at_work = False  # the Trainer is training on that batch
        self._trainer = trainer
        self._before = vars(trainer).get("training_step")  # somebody else may stand in for the method, too
        self._users = 0
        self._loader: Any = None
        self._own: tuple[Any, Any] = (None, None)  # the loader's data set and collator
        self._itself = False  # batches have numbers without our doing
        trainer.training_step = self._training_step

    def release(self) -> None:
        """Let go; after the last one, Trainer and loader are as they were."""
        self._users -= 1
        if self._users:
            return
        self._put_back()
        if self._before is None:
            vars(self._trainer).pop("training_step", None)
        else:
            self._trainer.training_step = self._before

    def number(self, loader: Any) -> None:
        """Have a Trainer's loader number its rows, unless it does. Call it before the loader is read.

        Others may read data set and collator of the loader when training begins; they get them as they were, if this is
        called when an epoch begins.
        """
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's loaders hold torch's
        if inner is self._loader:
            return
        self._put_back()
        dataset, collate = getattr(inner, "dataset", None), getattr(inner, "collate_fn", None)
        self._itself = isinstance(collate, Collator) and ROW in getattr(dataset, "column_names", ())
        if not self._itself and _indexed(dataset) and collate is not None:
            self._loader, self._own = inner, (dataset, collate)
            _set(inner, Numbered(dataset), NumberingCollator(collate))

    def _put_back(self) -> None:
        if self._loader is not None:
            _set(self._loader, *self._own)
        self._loader, self._itself = None, False

    def _training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        """Train, and know on what."""
        inputs = self._read(inputs)
        step = self._before or partial(type(self._trainer).training_step, self._trainer)
        self.at_work = True
        try:
            return step(model, inputs, *rest, **named)
        finally:
            self.at_work = False

    def _read(self, inputs: Any) -> Any:
        """Read the numbers, and give what the Trainer would have without them."""
        self.rows = self.labels = None
        if isinstance(inputs, Mapping):
            self.rows, self.labels = inputs.get(ROW if self._itself else _KEY), inputs.get("labels")
        if self.rows is None or self._itself:
            return inputs
        return type(inputs)({name: value for name, value in inputs.items() if name != _KEY})


def row_numbers(trainer: Trainer) -> RowNumbers:
    """Take a Trainer's `RowNumbers`: that which somebody has taken already, or a new one."""
    owner = getattr(vars(trainer).get("training_step"), "__self__", None)
    numbers = owner if isinstance(owner, RowNumbers) else RowNumbers(trainer)
    numbers._users += 1
    return numbers


def _indexed(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def _set(loader: Any, dataset: Any, collate: Any) -> None:
    """Exchange what a loader reads: torch guards the data set, since a sampler may go by another's length."""
    object.__setattr__(loader, "dataset", dataset)
    loader.collate_fn = collate
