"""IST's policy: layers by importance, kept up to date by suppressing the response of some, or from gradients' norms."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.ist import maths
from siftune.methods.ist.settings import ISTSettings

logger = logging.getLogger(__name__)


class Importance(LayerPolicy):
    """Draws layers by importance.

    Every `interval` steps it moves the importance by what a few sets of layers matter; or in every step, by the norms
    of the gradients of the layers that train.
    """

    importance: Tensor  # (L,) float64 logits, high = important

    def __init__(self, stack: LayerStack, settings: ISTSettings, generator: torch.Generator) -> None:
        self.importance = torch.zeros(len(stack.numbers), dtype=torch.float64)
        self.needs_norms = settings.scores_nothing
        self.needs_rows = settings.interval is not None and not self.needs_norms
        self._settings = settings
        self._generator = generator

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Move the importance if it is time, then draw the layers of the coming step."""
        interval = self._settings.interval
        due = self.needs_rows and interval is not None and step > 0 and step % interval == 0
        scoring = self._score(step, compare) if due else {}
        active_N = maths.draw_active(self.importance, self._settings.active, self._generator)
        moved = bool(scoring) or (self.needs_norms and step > 0)
        return LayerChoice(step, tuple(active_N.tolist()), self.importance, moved, **scoring)

    def observe(self, positions_N: Tensor, norms_N: Tensor) -> None:
        """Move the importance of the layers that train towards the logarithms of their gradients' norms."""
        self.importance = maths.follow_norms(self.importance, positions_N, norms_N)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {"importance": self.importance.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self.importance = torch.tensor(state["importance"], dtype=torch.float64)

    def _score(self, step: int, compare: Compare) -> dict[str, Any]:
        """Compare candidate sets on drawn rows and move the importance."""
        settings = self._settings
        sets_KN = maths.draw_candidates(self.importance, settings.candidates, settings.suppressed, self._generator)
        losses_K = compare(sets_KN, settings.factor, settings.score_batch_size)
        if not bool(torch.isfinite(losses_K).all()):
            logger.warning("step %d: losses %s are not finite; importance stays as it was", step, losses_K.tolist())
            return {}
        rewards_K = maths.rewards(losses_K)
        self.importance = maths.update_importance(self.importance, sets_KN, rewards_K, settings.score_lr)
        return {
            "losses": tuple(losses_K.tolist()),
            "rewards": tuple(rewards_K.tolist()),
            "suppressed": tuple(tuple(layers) for layers in sets_KN.tolist()),
        }
