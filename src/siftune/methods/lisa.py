"""LISA: a few layers drawn at random and held for some steps.

Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", NeurIPS 2024,
arXiv 2403.17919, algorithm 1: every K steps draw γ decoder layers uniformly; these train, and the embeddings and the
head; all others are frozen.

    γ   `active`
    K   `interval`

The paper trains the layers' full weights, and embeddings and head as well. Here the trainable parameters of a layer
train, be they adapters or (`siftune train --adapter full`) weights. Trainable parameters outside of the layers train in
every step; here they are frozen.

Ours, not the paper's: a share of the layers instead of a number. The optimizer drops the state of the layers that
leave. The paper does not mention it, but its claim on memory requires it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from siftune.base.errors import RecipeError
from siftune.base.numerics import draw_uniform
from siftune.base.settings import documented
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.options import LISASettings, count_of


class HeldLayers(LayerPolicy):
    """Draws layers and holds them for `interval` optimizer steps.

    Raises:
        RecipeError: `active` is above the number of layers with trainable parameters.
    """

    drops_state = True

    def __init__(self, stack: LayerStack, settings: LISASettings, generator: torch.Generator) -> None:
        self._layers = len(stack.numbers)
        if settings.active > self._layers:
            raise RecipeError(f"lisa.active is {settings.active}, but only {self._layers} layers can train")
        self._count = count_of(settings.active, self._layers)
        self._interval = settings.interval
        self._generator = generator
        self._current: tuple[int, ...] = ()

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Hold the layers, or draw new ones if it is time."""
        if step % self._interval == 0 or not self._current:
            self._current = tuple(draw_uniform(self._layers, self._count, self._generator).tolist())
        return LayerChoice(step, self._current)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: the positions of the current layers."""
        return {"current": list(self._current)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self._current = tuple(state["current"])


@documented
@dataclass(eq=False)
class LISA(LayerCallback, LISASettings):
    """LISA: a few layers at random, held for some steps (arXiv 2403.17919).

    Args:
        seed: Seed of LISA's own generator.
        layers: Path of the decoder layers, if their structure does not identify them.

    Attributes:
        last: The `LayerChoice` of the current step; its `layers` are the numbers of the layers that train.
        on_select: Callback for each step's choice, optional.

    Raises:
        RecipeError: A setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[LISA(active=2, interval=20)])
        >>> output = trainer.train()
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> HeldLayers:
        """Layers at random, held."""
        return HeldLayers(stack, self, generator)
