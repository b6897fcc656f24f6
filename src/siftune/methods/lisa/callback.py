"""LISA for any transformers Trainer, and for plain training loops.

Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", NeurIPS 2024,
arXiv 2403.17919, algorithm 1: every K steps draw γ decoder layers uniformly; these train, and the embeddings and the
head; all others are frozen.

    γ   `active`
    K   `interval`

The paper trains the layers' whole weights, and embeddings and head as well. Here what trains in a layer is whatever
the model has there, adapters or (`siftune train --adapter full`) the weights; and outside of the layers whatever else
is trainable, in every step (`siftune train --outside embeddings head`).

Ours, not the paper's: a share of the layers in the place of a number; whether the optimizer forgets the layers that
leave (`keep_state`), on which the paper is silent: its claim on memory needs them forgotten; and windows of neighbours
(`pattern`), which let backward end earlier than layers anywhere, visits in turn, and steps at the start in which all
layers train: `maths.py`. With `interval=1` and `keep_state` it is RST. A window that never moves is Static's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from siftune.errors import RecipeError
from siftune.methods.layer_callback import LayerCallback
from siftune.methods.layer_draws import draw_uniform, share
from siftune.methods.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.lisa import maths
from siftune.methods.lisa.settings import LISASettings
from siftune.settings import documented


class HeldLayers(LayerPolicy):
    """Draws layers and holds them for `interval` optimizer steps.

    Args:
        stack: The layers.
        settings: LISA's.
        generator: Source of randomness, on the CPU.

    Raises:
        RecipeError: More layers are to train than there are to draw from.
    """

    def __init__(self, stack: LayerStack, settings: LISASettings, generator: torch.Generator) -> None:
        self.drops_state = not settings.keep_state
        self._layers = len(stack.numbers)
        self._first = self._layers // 2 if settings.pattern == "upper" else 0
        active, there = settings.active, self._layers - self._first
        self._count = active if isinstance(active, int) else share(active, self._layers)
        if self._count > there:
            where = " in their upper half" if self._first else ""
            raise RecipeError(f"lisa.active is {active}, but only {there} layers{where} have something to train")
        self._settings = settings
        self._generator = generator
        self._current: tuple[int, ...] = ()
        self._waiting: list[int] = []

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Hold the layers, or draw anew if it is time."""
        since = step - self._settings.select_after
        if since < 0:
            return LayerChoice(step, tuple(range(self._layers)))
        if since % self._settings.interval == 0 or not self._current:
            self._current = tuple(self._draw())
        return LayerChoice(step, self._current)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: the positions of the layers that are held, and who has not had its turn."""
        return {"current": list(self._current), "waiting": self._waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self._current = tuple(state["current"])
        self._waiting = list(state["waiting"])

    def _draw(self) -> list[int]:
        """Positions of the layers that come next, ascending."""
        if self._settings.pattern == "scattered":
            return self._some(range(self._layers), self._count)
        starts = maths.window_starts(self._first, self._layers, self._count, self._settings.in_turn)
        (start,) = self._some(starts, 1)
        return list(range(start, start + self._count))

    def _some(self, everyone: Sequence[int], count: int) -> list[int]:
        """Some of them, ascending: in turn, or any."""
        if self._settings.in_turn:
            come, self._waiting = maths.deal(self._waiting, everyone, count, self._generator)
            return sorted(come)
        return [everyone[at] for at in draw_uniform(len(everyone), count, self._generator).tolist()]


@documented
@dataclass(eq=False)
class LISA(LayerCallback, LISASettings):
    """LISA: a few layers at random, held for some steps (arXiv 2403.17919).

    Args:
        seed: Seed of LISA's own generator.
        layers: Path of the decoder layers, where they are not found by structure.

    Attributes:
        last: The `LayerChoice` of the current step: `layers` are the numbers of those that train.
        on_select: Called with each step's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[LISA(active=2, interval=20)])
        >>> output = trainer.train()
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> HeldLayers:
        """Layers at random, held."""
        return HeldLayers(stack, self, generator)
