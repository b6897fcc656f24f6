"""Rows of a target among the rows that a model trains on: who they are, and which of a batch's rows are such.

Nothing tells a method where a row of a batch is from, so rows are known by their tokens: what attention sees of them.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from siftune.errors import RecipeError, UnsupportedError
from siftune.methods.batches import Batch

logger = logging.getLogger(__name__)

Key = tuple[int, ...]
_PATIENCE = 500  # rows that may pass without one of the target's, before somebody is told


class TargetRows:
    """Knows the rows of a target again, in the batches that a model is given.

    Args:
        batches: Batches that hold them, prepared as those of training are; read once.

    Raises:
        RecipeError: They hold no rows.

    Example:
        >>> rows = TargetRows([{"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}])
        >>> rows.among(torch.tensor([[7, 8], [5, 6]]), None)
        tensor([False,  True])
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._keys = {key for batch in batches for key in _keys(batch["input_ids"], batch.get("attention_mask"))}
        if not self._keys:
            raise RecipeError('support="target" was given no rows of a target; give at least one')
        self._given: tuple[Tensor, Tensor | None] | None = None
        self._passed: int | None = 0  # rows so far, none of them the target's; None once that is settled

    def watch(self, model: nn.Module) -> Any:
        """Look at what a model is given, until the handle that is returned is removed."""
        return model.register_forward_pre_hook(self._look, with_kwargs=True)

    def in_batch(self, samples: int) -> Tensor:
        """Which rows of the batch that the model was given last are the target's; (samples,) bool, on the CPU.

        Args:
            samples: Samples in it: rows, or pairs, of which the first rows speak.

        Raises:
            UnsupportedError: The model was not called with `input_ids`.
        """
        if self._given is None:
            raise UnsupportedError(
                'support="target" knows rows by their tokens, but the model was called without input_ids; call it with '
                'them, or take support="dataset"'
            )
        among_S = self.among(*self._given)[:samples]
        self._tell(among_S)
        return among_S

    def among(self, input_ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Which rows are the target's; (B,) bool, on the CPU."""
        return torch.tensor([key in self._keys for key in _keys(input_ids_BT, mask_BT)])

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            ids = kwargs.get("input_ids", args[0] if args else None)
            self._given = None if ids is None else (ids, kwargs.get("attention_mask"))

    def _tell(self, among_S: Tensor) -> None:
        if self._passed is None:
            return
        self._passed = None if bool(among_S.any()) else self._passed + len(among_S)
        if self._passed is not None and self._passed >= _PATIENCE:
            logger.warning(
                "none of %d rows was one of the target's, so that all rows are followed; put the target's rows among "
                'the training rows, prepared as they are, or take support="dataset"',
                self._passed,
            )
            self._passed = None


def _keys(input_ids_BT: Tensor, mask_BT: Tensor | None) -> Iterator[Key]:
    """The tokens of every row that attention sees."""
    masks = [None] * len(input_ids_BT) if mask_BT is None else mask_BT.bool().tolist()
    for ids, mask in zip(input_ids_BT.tolist(), masks, strict=True):
        yield tuple(ids if mask is None else (token for token, seen in zip(ids, mask, strict=True) if seen))
