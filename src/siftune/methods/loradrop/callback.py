"""LoRA-drop for any transformers Trainer, and for plain training loops."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import RecipeError, TrainingError
from siftune.base.settings import documented
from siftune.methods.drivers.batches import Batch
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_draws import share
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerSelection, LayerStack
from siftune.methods.loradrop import maths
from siftune.methods.loradrop.settings import LoRADropSettings


class RespondingLayers(LayerPolicy):
    """All layers at first; then those whose adapters respond most, for good."""

    needs_rows = True
    needs_responses = True

    def __init__(self, stack: LayerStack, settings: LoRADropSettings) -> None:
        self._layers = len(stack.numbers)
        self._settings = settings
        self._kept: tuple[int, ...] | None = None

    def rows_for_responses(self, step: int) -> int:
        """Rows to measure on, once, when it is time."""
        return self._settings.score_rows if self._kept is None and step >= self._settings.select_after else 0

    def note_responses(self, responses_L: Tensor) -> None:
        """Choose the layers.

        Raises:
            TrainingError: A response is not finite.
        """
        if not bool(torch.isfinite(responses_L).all()):
            layer = int((~torch.isfinite(responses_L)).nonzero()[0])
            raise TrainingError(
                f"layer {layer} answers LoRA-drop's rows with numbers that are not finite, so that no layers can be "
                "chosen. Lower --lr, or train in --dtype float32."
            )
        shares_L, active = maths.importance(responses_L), self._settings.active
        if active is None:
            kept = maths.by_threshold(shares_L, self._settings.threshold)
        else:
            kept = maths.by_count(shares_L, active if isinstance(active, int) else share(active, self._layers))
        self._kept = tuple(kept.tolist())

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """All layers, or those that were kept."""
        return LayerChoice(step, tuple(range(self._layers)) if self._kept is None else self._kept)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: the positions of the layers that were kept; None before."""
        return {"kept": self._kept and list(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self._kept = None if state["kept"] is None else tuple(state["kept"])


@documented
@dataclass(eq=False)
class LoRADrop(LayerCallback, LoRADropSettings):
    """LoRA-drop's choice of layers: after some steps those train whose adapters respond most (arXiv 2402.07721).

    A response is what a module gives less what its base gives. Of plain LoRA and bottlenecks it is read where it is
    computed; of others, on a base in half precision, a response below its rounding is not seen: with these measure
    after steps enough (`select_after`).

    Args:
        seed: Seed of its own generator, which draws the rows.
        layers: Path of the decoder layers, where they are not found by structure.

    Attributes:
        last: The `LayerChoice` of the current step: `layers` are the numbers of those that train.
        on_select: Called with each step's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.
        AdapterError: A layer has no adapter, so that nothing responds.

    Example:
        >>> drop = LoRADrop(active=2, select_after=3)
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[drop])
        >>> output = trainer.train()
        >>> len(drop.last.layers)
        2
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> RespondingLayers:
        """Layers by their responses."""
        return RespondingLayers(stack, self)

    def attach(
        self,
        model: nn.Module,
        *,
        batches: Iterable[Batch] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> LayerSelection:
        """Select layers in a plain training loop; see `LayerCallback.attach`.

        Args:
            model: Causal LM with adapters.
            batches: Rows to measure responses on: the first batch, whatever its size.
            optimizer: Where given, its steps drive the selection; else call `step()` after each.

        Raises:
            RecipeError: There are no batches.
        """
        if batches is None:
            raise RecipeError("LoRADrop measures responses on rows: give attach(..., batches=...)")
        return self._attach(model, batches=batches, optimizer=optimizer)
