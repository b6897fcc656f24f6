"""The masked update: does sparsity regularise at all? An experiment, not a method: it saves nothing.

All layers have their gradients and Adam its moments, as in plain training. Of the step, though, a random half of the
layers takes back its part, and the others' parts are made longer, so that the expected step is plain training's:

    θ_ℓ ← θ_ℓ + (m_ℓ / p)·Δ_ℓ,   m_ℓ = 1 for a random share p of the layers, drawn anew in every step, else 0

Adam's steps do not grow with the gradient, so that steps are made longer *after* the optimizer, from values noted
before. Since gradients and moments do not depend on the draw, the expectation of a step over it is exactly Δ, with
every optimizer; only noise is added. What methods that train few layers gain or lose beside this noise comes from
moments that move seldom. After SkipUpdate and Magma, arXiv 2602.15322; by decoder layer here.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.numerics import draw_uniform
from siftune.engine.groups import group_by_layer
from siftune.methods.options import count_of


class MaskedUpdate(TrainerCallback):
    """Takes back the steps of some layers, and lengthens the others'.

    It has no place in checkpoints: a run that is resumed draws other layers.

    Args:
        kept: Share p of the layers whose step is kept; 1 is plain training.
        seed: Seed of the draws.

    Attributes:
        on_select: Called with the numbers of the layers that are kept in a step, where set.
    """

    def __init__(self, kept: float = 0.5, seed: int = 0) -> None:
        self.on_select: Callable[[tuple[int, ...]], None] | None = None
        self._kept = kept
        self._generator = torch.Generator().manual_seed(seed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers."""
        self._groups = group_by_layer(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the layers that are kept, and note what the others go back to."""
        layers = len(self._groups)
        kept = draw_uniform(layers, count_of(self._kept, layers), self._generator).tolist()
        if self.on_select is not None:
            self.on_select(tuple(self._groups[at].index for at in kept))
        lengths = [layers / len(kept) if at in kept else 0.0 for at in range(layers)]
        owners = zip(self._groups, lengths, strict=True)
        changed = [(p, length) for group, length in owners if length != 1 for p in group.parameters.values()]
        self._before = [(p, p.detach().clone(), length) for p, length in changed]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back and lengthen: before + length·(after − before)."""
        with torch.no_grad():
            for parameter, before, length in self._before:
                parameter.lerp_(before, 1 - length)  # as torch computes it: exact for 0, and where nothing has changed
        self._before.clear()
