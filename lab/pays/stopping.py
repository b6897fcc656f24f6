"""Early stopping: the adapter of the step at which held-out known rows fared best."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class KeepBest(TrainerCallback):
    """Measures every so many steps, and puts the best weights back when training has ended.

    The course of the learning rate is that of the whole training, as of a user who looks back at its checkpoints.

    Args:
        loss: Of a model on rows that are held back; measured before the first step too.
        every: Optimizer steps between two measurements.
    """

    def __init__(self, loss: Callable[[nn.Module], float], every: int) -> None:
        self._loss, self._every = loss, every
        self._weights: list[torch.Tensor] = []
        self.best = float("inf")
        self.step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the untrained model."""
        self._look(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and keep the weights where they are the best so far."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._look(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the best weights back."""
        with torch.no_grad():
            for parameter, best in zip(_trainable(kwargs["model"]), self._weights, strict=True):
                parameter.copy_(best)

    def _look(self, model: nn.Module, step: int) -> None:
        loss = self._loss(model)
        if loss < self.best:
            self.best, self.step = loss, step
            self._weights = [parameter.detach().clone() for parameter in _trainable(model)]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
