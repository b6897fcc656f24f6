"""Logits at the label positions only, in a causal LM that computes its own loss, with the same loss and gradients.

`logits_at` leaves the loss to its caller. Here the model computes its own, as in every Trainer. The model receives the
labels of fewer positions, and its head the hidden states at the same positions.

    hidden states   (B, T, H) → (1, N + 1, H)   those before a label, in row-major order, and one more
    labels          (B, T)    → (1, N + 1)      -100, and the N labels that follow them

A causal LM's loss compares position i with label i + 1: the N positions with their labels, and the last with none. So
the loss is the same sum over the same terms, divided by the same number. The rest of the forward pass does not change:
auxiliary losses, caps and scales of logits.

In TRL's trainers the model returns log-probabilities and no logits (`fused_lm_head=True`). Then the backbone's output
is reduced, and TRL receives shape (1, N).
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import LayerError
from siftune.models.loss import IGNORED, find_output_embeddings, label_positions, losses_agree, next_labels, places
from siftune.models.modules import evaluating, inner_model

logger = logging.getLogger(__name__)

_FUSED = "fused_lm_head"  # TRL's argument of `forward`


class LabelHead:
    """Hooks on a causal LM, until `remove()`, that leave out the logits of positions without a label.

    They act in training mode if the model is called with `labels`. The output's logits then have shape (1, N + 1, V),
    those of the N positions first. Before the first use, the two losses are compared on one row. If they differ, the
    hooks are disabled permanently, with a warning.

    Raises:
        LayerError: The model has no output embeddings.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = _causal_lm(model)
        head = find_output_embeddings(self._model)
        self._positions: Tensor | None = None  # of the hidden states to keep, in the current pass
        self._used = 0
        self._fused = False
        self._comparing = False
        self._agrees: bool | None = None
        hooks = ExitStack()
        for handle in (
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            head.register_forward_pre_hook(self._for_head),
            getattr(self._model, "base_model", self._model).register_forward_hook(self._for_trl),
            self._model.register_forward_hook(self._end, always_call=True),
        ):
            hooks.callback(handle.remove)
        self.remove = hooks.close

    def __enter__(self) -> "LabelHead":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the labels by those of fewer positions."""
        self._positions = None  # Ctrl-C may have left those of a pass: torch then runs no hooks
        labels = kwargs.get("labels")
        acts = model.training or self._comparing
        if not acts or not isinstance(labels, Tensor) or kwargs.get("shift_labels") is not None:
            return None
        if self._agrees is None and label_positions(labels).any():
            self._agrees = self._compare(kwargs)
        if not self._agrees:
            return None
        where = places(label_positions(labels))
        self._positions, self._used = torch.cat([where, where.new_zeros(1)]), 0
        self._fused = bool(kwargs.get(_FUSED))
        return args, {**kwargs, "labels": torch.cat([labels.new_tensor([IGNORED]), next_labels(labels)])[None]}

    def _for_head(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._positions is None or self._fused:
            return None
        return (self._picked(args[0]), *args[1:])

    def _for_trl(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._positions is not None and self._fused:
            output.last_hidden_state = self._picked(output.last_hidden_state)

    def _picked(self, hidden_BTH: Tensor) -> Tensor:
        assert self._positions is not None
        self._used += 1
        flat = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
        return flat.index_select(0, self._positions.to(flat.device))[None]

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        begun, self._positions = self._positions is not None, None
        if begun and output is not None and self._used != 1:
            raise LayerError(
                f"{type(model).__name__} called its head {self._used} times in a forward pass, where once is "
                "supported; leave LabelLogits off"
            )

    def _compare(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether both ways give the same loss, up to rounding, on the row with the most labels."""
        row = int(label_positions(kwargs["labels"]).sum(1).argmax())
        rows = kwargs["labels"].shape[0]
        one = {name: _of_row(value, row, rows) for name, value in kwargs.items() if name != "num_items_in_batch"}
        try:
            with evaluating(self._model):
                theirs, ours = (float(self._loss(one, smaller)) for smaller in (False, True))
        except (LayerError, ValueError, RuntimeError, IndexError) as error:  # raised by the model for fewer positions
            logger.warning("logits are computed at all positions: %s", error)
            return False
        agree = losses_agree(self._model, ours, theirs)
        if not agree:
            logger.warning(
                "logits are computed at all positions: the loss of %s is %.5g, and %.5g over its label positions alone",
                type(self._model).__name__,
                theirs,
                ours,
            )
        return agree

    def _loss(self, kwargs: Mapping[str, Any], smaller: bool) -> Tensor:
        """Compute the model's loss in either way, whatever its mode."""
        self._agrees = self._comparing = smaller
        try:
            loss: Tensor = self._model(**kwargs).loss
            return loss
        finally:
            self._comparing = False


def _of_row(value: Any, row: int, rows: int) -> Any:
    """Select one row of a batch's tensor; return other arguments unchanged."""
    return value[row : row + 1] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value


def _causal_lm(model: Any) -> Any:
    """Unwrap the model from PEFT and other wrappers."""
    return inner_model(getattr(model, "module", model))
