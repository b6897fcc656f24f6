"""IST for any transformers Trainer and for custom training loops; the equations are in `maths`."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import RecipeError
from siftune.base.settings import documented
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerSelection, LayerStack
from siftune.methods.ist import maths
from siftune.methods.options import ISTSettings
from siftune.models.loss import Batch, Loss, model_loss

logger = logging.getLogger(__name__)

# the paper's
SUPPRESSED = 0.5  # share of the layers in a candidate set
FACTOR = 0.25  # of the adapter response of a suppressed layer
SCORE_LR = 10.0  # learning rate of the importance


class Importance(LayerPolicy):
    """Draws layers by importance, which it updates every `interval` steps by comparing candidate sets of layers."""

    importance: Tensor  # (L,) float64 logits, high = important
    needs_rows = True

    def __init__(self, stack: LayerStack, settings: ISTSettings, generator: torch.Generator) -> None:
        self.importance = torch.zeros(len(stack.numbers), dtype=torch.float64)
        self._settings = settings
        self._generator = generator

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Update the importance if it is time, then draw the layers of the next step."""
        due = step > 0 and step % self._settings.interval == 0
        scoring = self._score(step, compare) if due else {}
        active_N = maths.draw_active(self.importance, self._settings.active, self._generator)
        return LayerChoice(step, tuple(active_N.tolist()), self.importance, bool(scoring), **scoring)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {"importance": self.importance.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self.importance = torch.tensor(state["importance"], dtype=torch.float64)

    def _score(self, step: int, compare: Compare) -> dict[str, Any]:
        """Compare candidate sets on drawn rows and update the importance."""
        settings = self._settings
        sets_KN = maths.draw_candidates(self.importance, settings.candidates, SUPPRESSED, self._generator)
        losses_K = compare(sets_KN, FACTOR, settings.score_batch_size)
        if not bool(torch.isfinite(losses_K).all()):
            logger.warning("step %d: losses %s are not finite; the importance is unchanged", step, losses_K.tolist())
            return {}
        rewards_K = maths.rewards(losses_K)
        self.importance = maths.update_importance(self.importance, sets_KN, rewards_K, SCORE_LR)
        return {
            "losses": tuple(losses_K.tolist()),
            "rewards": tuple(rewards_K.tolist()),
            "suppressed": tuple(tuple(layers) for layers in sets_KN.tolist()),
        }


@documented
@dataclass(eq=False)
class IST(LayerCallback, ISTSettings):
    """Importance-aware Sparse Tuning: train the layers that matter (arXiv 2410.11772).

    Args:
        seed: Seed of IST's own generator.
        layers: Path of the decoder layers, if their structure does not identify them.
        on_select: Callback for each step's choice, optional.

    Attributes:
        last: The `LayerChoice` of the current step.
        importance: (L,) float64 importance logits, high = important.

    Raises:
        RecipeError: A setting is out of its range.

    Example:
        >>> ist = IST(active=0.5, interval=2)
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[ist])
        >>> output = trainer.train()
        >>> len(ist.last.layers), ist.importance.shape  # half of the model's four layers
        (2, torch.Size([4]))
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> Importance:
        """Layers by importance."""
        return Importance(stack, self, generator)

    def attach(
        self,
        model: nn.Module,
        *,
        batches: Iterable[Batch] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss = model_loss,
    ) -> LayerSelection:
        """Select layers in a custom training loop.

        Args:
            model: Causal LM with adapters.
            batches: Batches for comparing the candidate sets, one per update; restarted at the end.
            optimizer: If passed, its steps drive the selection; else call `step()` after each.
            loss: Loss of a batch, a scalar.

        Returns:
            A context manager; `last.layers` are the layers that train now.

        Raises:
            RecipeError: `batches` is missing.

        Example:
            >>> with IST(active=0.5, interval=2).attach(model, batches=loader, optimizer=optimizer) as selection:
            ...     for batch in loader:
            ...         model(**batch).loss.backward()
            ...         optimizer.step()
            ...         optimizer.zero_grad()
            ...     selection.importance.shape
            torch.Size([4])
        """
        if batches is None:
            raise RecipeError("IST compares layers on rows: pass attach(..., batches=...), or take RST")
        return self._attach(model, batches, optimizer, loss)
