"""Rows for scoring: drawn from the training set, or batches of the user; and their weight."""

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from siftune.base.errors import DataError, RecipeError
from siftune.models.loss import IGNORED, Batch


class Draws(Protocol):
    """Source of a method's rows."""

    def draw(self, count: int, chunk: int) -> Sequence[Batch]:
        """Draw `count` rows as batches of at most `chunk` rows."""


class RowDraws:
    """Draws batches from a dataset without touching the global generators or the Trainer's sampler.

    The dataset is indexed by row, or an iterable that can be restarted. An iterable is read by an iterator of its own;
    `taken` counts its rows, including those before a resume. The generator is on the CPU.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Batch], generator: torch.Generator, taken: int = 0
    ) -> None:
        self._dataset = dataset
        self._collate = collate
        self._generator = generator
        self._indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        self._iterator: Iterator[Any] | None = None
        self.taken = taken

    @classmethod
    def of_loader(cls, loader: Any, generator: torch.Generator, instead: str, rows: Any = None) -> "RowDraws":
        """Draw from a loader's rows, or from others with its collator.

        Raises:
            RecipeError: It is no DataLoader; `instead` says what to do.
            DataError: The collator makes no batch of the rows, or drawing rows would take them from training.
        """
        if not hasattr(loader, "dataset") or not hasattr(loader, "collate_fn"):
            name = type(loader).__name__
            raise RecipeError(f"the training rows are a {name}, no DataLoader to draw rows from: {instead}")
        draws = cls(loader.dataset if rows is None else rows, loader.collate_fn, generator)
        draws._check(shared=rows is None and not getattr(loader, "num_workers", 0))
        return draws

    def draw(self, count: int, chunk: int) -> list[Batch]:
        """Draw `count` rows, or all if there are fewer, as batches of at most `chunk` rows."""
        rows = self._pick(count) if self._indexed else self._next_rows(count)
        if not rows:
            raise DataError("the training set yields no rows to score layers on")
        return [self._batch(rows[start : start + chunk]) for start in range(0, len(rows), chunk)]

    def _check(self, shared: bool) -> None:
        """Check that the collator makes a batch of rows, and that an iterable is not one that training reads itself."""
        if shared and not self._indexed and iter(self._dataset) is iter(self._dataset):
            raise DataError(
                f"one iterator of the {type(self._dataset).__name__} serves all readers, so that rows drawn from it "
                "would be missing from training: give a dataset whose __iter__ returns a new iterator"
            )
        if self._indexed and len(self._dataset):
            self._batch([self._dataset[0]])

    def _batch(self, rows: list[Any]) -> Batch:
        with torch.random.fork_rng(devices=[]):
            batch = collated(rows, self._collate)
        if not isinstance(batch, Mapping):
            raise DataError(
                f"the Trainer's collator makes a {type(batch).__name__} of rows, not a batch, as in trainers that "
                "generate their batches, such as GRPO, so that there are no rows to score layers on or to compare "
                'gradients with: use GAST with support="rest", or RST'
            )
        return batch

    def _pick(self, count: int) -> list[Any]:
        order = torch.randperm(len(self._dataset), generator=self._generator)[:count]
        return [self._dataset[index] for index in order.tolist()]

    def _next_rows(self, count: int) -> list[Any]:
        if self._iterator is None:
            self._iterator = itertools.islice(_forever(self._dataset), self.taken, None)
        rows = list(itertools.islice(self._iterator, count))
        self.taken += len(rows)
        return rows


class UserBatches:
    """Batches with labels from the user, one per draw whatever its size; after the last comes the first.

    They are an iterable that can be restarted, or an endless one.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._iterator: Iterator[Batch] | None = None
        self.taken = 0

    def draw(self, count: int, chunk: int) -> Sequence[Batch]:
        """Return the next batch."""
        if self._iterator is None:
            self._iterator = itertools.islice(_forever(self._batches), self.taken, None)
        batch = next(self._iterator, None)
        if batch is None:
            raise DataError("attach(..., batches=...) yields no more batches: pass an iterable that can be restarted")
        self.taken += 1
        return [batch]


def collated(rows: list[Any], collate: Callable[[list[Any]], Any]) -> Any:
    """What the Trainer's collator makes of rows.

    Raises:
        DataError: The rows lack a column that it needs, such as the tokens.
    """
    try:
        return collate(rows)
    except KeyError as error:
        raise DataError(
            f"the Trainer's collator finds no {error} in the rows: give them as in trainer.train_dataset, tokenized"
        ) from error


def _forever(rows: Iterable[Any]) -> Iterator[Any]:
    """Repeat an iterable; stop if it yields nothing."""
    while True:
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            return


def draws_state(generator: torch.Generator, draws: Any) -> dict[str, Any]:
    """JSON-ready state of a generator, and the number of rows that `draws` has taken from an iterable."""
    state = generator.get_state().numpy().tobytes()
    return {"generator": base64.b64encode(state).decode("ascii"), "taken": getattr(draws, "taken", 0)}


def load_draws_state(state: Mapping[str, Any], generator: torch.Generator, draws: Any) -> None:
    """Continue from a `draws_state()`."""
    raw = bytearray(base64.b64decode(state["generator"]))
    generator.set_state(torch.frombuffer(raw, dtype=torch.uint8))
    if hasattr(draws, "taken"):
        draws.taken = int(state["taken"])


def label_weight(batch: Batch) -> float:
    """Weight of a batch in a mean over tokens: its predicted labels; its rows if it has no labels."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return float((labels[:, 1:] != IGNORED).sum())
    sized = [value for value in batch.values() if hasattr(value, "__len__")]
    return float(len(sized[0]) if sized else 1)
