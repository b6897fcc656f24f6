"""LISA for any transformers Trainer, and for plain training loops.

Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", NeurIPS 2024,
arXiv 2403.17919, algorithm 1: every K steps draw γ decoder layers uniformly; these train, and the embeddings and the
head; all others are frozen.

    γ   `active`
    K   `interval`

The paper trains the layers' whole weights, and embeddings and head as well. Here what trains in a layer is whatever
the model has there, adapters or (`siftune train --adapter full`) the weights; and outside of the layers whatever else
is trainable, in every step (`siftune train --outside embeddings head`).

Ours, not the paper's: a share of the layers in the place of a number; and whether the optimizer forgets the layers that
leave (`keep_state`), on which the paper is silent: its claim on memory needs them forgotten. With `interval=1` and
`keep_state` it is RST.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from siftune.base.errors import RecipeError
from siftune.base.settings import documented
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_draws import draw_uniform, share
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.lisa.settings import LISASettings


class HeldLayers(LayerPolicy):
    """Draws layers and holds them for `interval` optimizer steps.

    Raises:
        RecipeError: More layers are to train than there are to draw from.
    """

    def __init__(self, stack: LayerStack, settings: LISASettings, generator: torch.Generator) -> None:
        self.drops_state = not settings.keep_state
        self._layers = len(stack.numbers)
        active = settings.active
        self._count = active if isinstance(active, int) else share(active, self._layers)
        if self._count > self._layers:
            raise RecipeError(f"lisa.active is {active}, but only {self._layers} layers have something to train")
        self._interval = settings.interval
        self._generator = generator
        self._current: tuple[int, ...] = ()

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Hold the layers, or draw anew if it is time."""
        if step % self._interval == 0 or not self._current:
            self._current = tuple(draw_uniform(self._layers, self._count, self._generator).tolist())
        return LayerChoice(step, self._current)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: the positions of the layers that are held."""
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
