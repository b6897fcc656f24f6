"""Layer selection at work on one model: draws, scoring and gates, step by step.

`LayerSelection` is what the Trainer callbacks drive, and what `attach` returns for a plain training loop.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from siftune.engine.distributed import mean_over_ranks, world_size
from siftune.engine.gate import LayerGates
from siftune.engine.groups import group_by_layer
from siftune.methods.batches import Batch, draws_state, label_weight, load_draws_state
from siftune.methods.ist import maths
from siftune.methods.rst import draw_uniform
from siftune.models.adapters import suppress
from siftune.models.modes import evaluating

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Selection:
    """One step's choice.

    Attributes:
        step: Optimizer steps done before it.
        layers: Numbers of the layers that train, from the embeddings, ascending.
        importance: (L,) float64 importance logits of the layers that have adapters; zeros for RST.
        losses: Losses of the candidate sets where this step scored them, else empty.
        rewards: Their rewards.
        suppressed: The candidate sets.
    """

    step: int
    layers: tuple[int, ...]
    importance: Tensor
    losses: tuple[float, ...] = ()
    rewards: tuple[float, ...] = ()
    suppressed: tuple[tuple[int, ...], ...] = ()

    def record(self) -> dict[str, Any]:
        """JSON-ready form, for a run's selection records."""
        record: dict[str, Any] = {"step": self.step, "layers": list(self.layers)}
        if self.losses:
            record |= {
                "importance": self.importance.tolist(),
                "losses": list(self.losses),
                "rewards": list(self.rewards),
                "suppressed": [list(layers) for layers in self.suppressed],
            }
        return record


class Draws(Protocol):
    """Where the rows come from on which candidate sets are compared."""

    def draw(self, count: int, chunk: int) -> Sequence[Batch]:
        """Draw `count` rows as batches of at most `chunk` rows."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model computes from a batch with labels."""
    device = next(model.parameters()).device
    loss: Tensor = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}).loss
    return loss


class LayerSelection:
    """IST or RST on a model, until `remove()`.

    In a plain loop use it as a context manager and call `step()` after every optimizer step, or give `attach` the
    optimizer, which then calls it.

    Args:
        model: Causal LM with adapters, PEFT-wrapped or not.
        settings: The method's settings.
        scored: True for IST, False for RST, which draws uniformly.
        draws: Rows for scoring; needed where IST's interval is not None.
        loss: Loss of a batch, a scalar; by default the model's own.
        layers: Path of the decoder layers in `model`, where they are not found by structure.
        chunk: Rows per forward pass when scoring.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: maths.ISTSettings,
        *,
        scored: bool = True,
        draws: Draws | None = None,
        loss: Loss = model_loss,
        layers: str | None = None,
        chunk: int = 16,
    ) -> None:
        self.model = model
        self.settings = settings
        self.groups = group_by_layer(model, layers)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.importance = torch.zeros(len(self.groups), dtype=torch.float64)
        self.draws = draws
        self.loss = loss
        self.steps = 0
        self.last: Selection | None = None
        self._scored = scored
        self._chunk = chunk
        self._handles: list[Any] = []
        self._gates = LayerGates(model, self.groups, deliver_zeros=world_size() > 1)

    def begin(self) -> Selection:
        """Score the layers if it is time, then draw those of the coming step."""
        scores = self._score() if self._is_due() else {}
        if self._scored:
            active = maths.draw_active(self.importance, self.settings.active, self.generator)
        else:
            active = draw_uniform(len(self.groups), self.settings.active, self.generator)
        layers = self._numbers(active.tolist())
        self._gates.set_active(layers)
        self.last = Selection(self.steps, layers, self.importance, **scores)
        return self.last

    def drop_inactive_grads(self) -> None:
        """Set the gradients of inactive layers to None; call it before an optimizer step."""
        self._gates.drop_inactive_grads()

    def step(self) -> Selection:
        """Note that an optimizer step is done, and choose the layers of the next."""
        self.steps += 1
        return self.begin()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Do `drop_inactive_grads()` before and `step()` after every step of `optimizer`."""
        self._handles += [
            optimizer.register_step_pre_hook(lambda *_: self.drop_inactive_grads()),
            optimizer.register_step_post_hook(lambda *_: self._follow_step()),
        ]

    def _follow_step(self) -> None:
        self.step()

    def remove(self) -> None:
        """Take everything off the model and the optimizer; calling it twice does no harm."""
        self._gates.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state between two optimizer steps: importance, layers, generator, steps."""
        return {
            "steps": self.steps,
            "importance": self.importance.tolist(),
            "layers": list(self.last.layers) if self.last else None,
            **draws_state(self.generator, self.draws),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, as if never interrupted."""
        self.steps = int(state["steps"])
        self.importance = torch.tensor(state["importance"], dtype=torch.float64)
        load_draws_state(state, self.generator, self.draws)
        if layers := state.get("layers"):  # of the coming step in a plain loop; a Trainer's callback draws anew
            self._gates.set_active(layers)
            self.last = Selection(self.steps, tuple(layers), self.importance)

    def __enter__(self) -> "LayerSelection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _is_due(self) -> bool:
        interval = self.settings.interval
        return self._scored and interval is not None and self.steps > 0 and self.steps % interval == 0

    def _score(self) -> dict[str, Any]:
        """Compare candidate sets on drawn rows and move the importance."""
        assert self.draws is not None
        sets_KN = maths.draw_candidates(self.importance, self.settings, self.generator)
        batches = self.draws.draw(self.settings.score_batch_size, self._chunk)
        with evaluating(self.model):
            losses_K = torch.tensor([self._suppressed_loss(s, batches) for s in sets_KN.tolist()], dtype=torch.float64)
        losses_K = mean_over_ranks(losses_K, next(self.model.parameters()).device)
        if not bool(torch.isfinite(losses_K).all()):
            logger.warning(
                "step %d: losses %s are not finite; importance stays as it was", self.steps, losses_K.tolist()
            )
            return {}
        rewards_K = maths.rewards(losses_K)
        self.importance = maths.update_importance(self.importance, sets_KN, rewards_K, self.settings.score_lr)
        return {
            "losses": tuple(losses_K.tolist()),
            "rewards": tuple(rewards_K.tolist()),
            "suppressed": tuple(self._numbers(layers) for layers in sets_KN.tolist()),
        }

    def _numbers(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the layers at some positions: layers without adapters are not counted among `groups`."""
        return tuple(self.groups[position].index for position in positions)

    def _suppressed_loss(self, layers: list[int], batches: Sequence[Batch]) -> float:
        """Mean loss over the batches with the adapters of `layers` damped."""
        weights = [label_weight(batch) for batch in batches]
        with suppress(self.groups, layers, self.settings.factor):
            losses = [float(self.loss(self.model, batch)) for batch in batches]
        weighted = [w * loss for w, loss in zip(weights, losses, strict=True) if w > 0]
        return sum(weighted) / sum(weights) if weighted else float("nan")
