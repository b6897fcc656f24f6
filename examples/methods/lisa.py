"""LISA: a few layers drawn at random and held for some steps. A method outside the package.

    trainer = Trainer(model, args, train_dataset=rows, callbacks=[LISA(active=2, interval=20)])

Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", NeurIPS 2024,
arXiv 2403.17919, algorithm 1: every K steps draw γ decoder layers uniformly; these train, and the embeddings and the
head; all others are frozen.

    γ   `active`
    K   `interval`

The paper trains the layers' full weights, and embeddings and head as well. Here the trainable parameters of a layer
train, be they adapters or weights. Trainable parameters outside of the layers train in every step.

Ours, not the paper's: a share of the layers instead of a number. The optimizer drops the state of the layers that
leave. The paper does not mention it, but its claim on memory requires it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic.dataclasses import dataclass as checked
from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.numerics import draw_uniform
from siftune.base.settings import CONFIG, Count, CountOrShare, Settings
from siftune.engine.groups import group_by_layer
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.options import count_of


@checked(config=CONFIG)
class LISASettings(Settings):
    """Options, whose ranges are checked."""

    group = "lisa"

    active: CountOrShare = 2
    """Layers that train: a number of layers, or a share such as 0.25."""
    interval: Count = 20
    """Optimizer steps between two draws."""


class HeldLayers(LayerPolicy):
    """Draws layers and holds them for `interval` optimizer steps."""

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


@dataclass(eq=False)
class LISA(LayerCallback, LISASettings):
    """A few layers at random, held for some steps. In a plain loop with `attach`, the optimizer keeps its state.

    Args:
        active: Layers that train: a number of layers, or a share such as 0.25.
        interval: Optimizer steps between two draws.
        seed: Seed of the method's own generator.
        layers: Path of the decoder layers, if their structure does not identify them.
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> HeldLayers:
        """Layers at random, held."""
        return HeldLayers(stack, self, generator)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the layers of a step, and drop the optimizer's state of the others."""
        super().on_step_begin(args, state, control, **kwargs)
        optimizer = kwargs["optimizer"]
        if args.deepspeed:
            raise UnsupportedError("LISA drops parts of the optimizer's state, which DeepSpeed holds: train with DDP")
        assert self.last is not None
        for group in group_by_layer(kwargs["model"], self.layers):
            for parameter in group.parameters.values() if group.index not in self.last.layers else ():
                optimizer.state.pop(parameter, None)
