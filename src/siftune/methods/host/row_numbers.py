"""Row numbers of a Trainer's batches, carried from the dataset into the batch.

No Trainer passes the rows of a batch to a callback. Therefore the dataset adds a number to each row (`Numbered`), and
the collator puts the numbers into the batch (`NumberingCollator`). They are read and removed before the Trainer trains
on the batch (`RowNumbers`), so that neither Trainer nor model sees them. Shuffling, workers, ranks and resuming do not
matter. siftune's own batches have numbers already.

A batch has numbers only if its row i is row i of the collator's input; their tokens are compared. Packed and
padding-free batches, pairs, and generated batches have none.

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
    """A dataset, indexed by row, that returns every row with its number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        """Whatever else the dataset has, such as `set_epoch`, which loaders call, or the names of its columns."""
        if name == "dataset" or name.startswith("__"):  # asked for in a worker, before there is a dataset
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> NumberedRow:
        return NumberedRow(int(index), self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[NumberedRow]:
        """Read a batch at once if the dataset can."""
        together = getattr(self.dataset, "__getitems__", None)
        rows = together(indices) if together is not None else [self.dataset[index] for index in indices]
        return [NumberedRow(int(index), row) for index, row in zip(indices, rows, strict=True)]


class NumberingCollator:
    """Puts the numbers of its rows into a batch if each row of the batch is one of them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[NumberedRow]) -> Any:
        """Make a batch, with or without numbers."""
        batch = self.collate([each.row for each in rows])
        if isinstance(batch, MutableMapping) and self._matches([each.row for each in rows], batch):
            batch[_KEY] = np.array([each.number for each in rows])  # no tensor, so that it stays on the CPU
        return batch

    @staticmethod
    def _matches(rows: Sequence[Any], batch: Mapping[str, Any]) -> bool:
        """Whether row i of a batch has the tokens of the i-th row, possibly truncated."""
        ids_BT, mask_BT = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(ids_BT, Tensor) or len(ids_BT) != len(rows):
            return False
        masks = [...] * len(rows) if mask_BT is None else mask_BT.bool().cpu().numpy()
        return all(map(_same, rows, ids_BT.cpu().numpy(), masks))


def _same(row: Any, ids_T: Any, mask_T: Any) -> bool:
    """Whether a row of a batch begins or ends with the row's tokens; a row of text has no tokens yet and passes."""
    tokens = row.get("input_ids") if isinstance(row, Mapping) else None
    if tokens is None:
        return True
    own, other = np.asarray(tokens), ids_T[mask_T]
    size = min(len(own), len(other))
    return size > 0 and (np.array_equal(own[:size], other[:size]) or np.array_equal(own[-size:], other[-size:]))


class RowNumbers:
    """Row numbers of the batch that a Trainer trains on.

    `row_numbers` returns a Trainer's; each user calls `release` at the end.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.rows: Tensor | None = None  # (B,) int64 on the CPU, row numbers of the last training batch
        self.labels: Tensor | None = None  # (B, T) int64, its labels
        self.at_work = False  # the Trainer is training on that batch
        self._trainer = trainer
        self._before = vars(trainer).get("training_step")  # others may replace the method, too
        self._users = 0
        self._loader: Any = None
        self._own: tuple[Any, Any] = (None, None)  # the loader's data set and collator
        self._itself = False  # the dataset has numbers of its own
        trainer.training_step = self._training_step

    def release(self) -> None:
        """End one use; after the last one, Trainer and loader are restored."""
        self._users -= 1
        if self._users:
            return
        self._put_back()
        if self._before is None:
            vars(self._trainer).pop("training_step", None)
        else:
            self._trainer.training_step = self._before

    def number(self, loader: Any) -> None:
        """Have a Trainer's loader number its rows. Call it before the loader is read.

        Others may read the loader's dataset and collator when training begins. They get the originals if this is called
        when an epoch begins.
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
        """Train, and note the row numbers."""
        inputs = self._read(inputs)
        step = self._before or partial(type(self._trainer).training_step, self._trainer)
        self.at_work = True
        try:
            return step(model, inputs, *rest, **named)
        finally:
            self.at_work = False

    def _read(self, inputs: Any) -> Any:
        """Read the numbers, and return the inputs without them."""
        self.rows = self.labels = None
        if isinstance(inputs, Mapping):
            rows, self.labels = inputs.get(ROW if self._itself else _KEY), inputs.get("labels")
            self.rows = None if rows is None else torch.from_numpy(rows)
        if self.rows is None or self._itself:
            return inputs
        return type(inputs)({name: value for name, value in inputs.items() if name != _KEY})


def row_numbers(trainer: Trainer) -> RowNumbers:
    """Return a Trainer's `RowNumbers`, a new one for the first user."""
    owner = getattr(vars(trainer).get("training_step"), "__self__", None)
    numbers = owner if isinstance(owner, RowNumbers) else RowNumbers(trainer)
    numbers._users += 1
    return numbers


def _indexed(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def _set(loader: Any, dataset: Any, collate: Any) -> None:
    """Replace a loader's dataset and collator; torch guards the dataset, since a sampler may depend on its length."""
    object.__setattr__(loader, "dataset", dataset)
    loader.collate_fn = collate
