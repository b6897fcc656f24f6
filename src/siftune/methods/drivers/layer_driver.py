"""Layer selection on one model: a policy chooses layers, and gates apply the choice, step by step.

The Trainer callbacks drive a `LayerSelection`, and their `attach` returns it for a custom training loop. A
`LayerPolicy` chooses the layers: IST draws by importance, RST at random.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siftune.base.ranks import in_group, mean_over_ranks
from siftune.engine.gate import Alive, LayerGates, always
from siftune.engine.groups import group_by_layer
from siftune.engine.suppression import adapted_modules, refuse_taken_apart, suppress
from siftune.methods.drivers.batches import Draws, draws_state, label_weight, load_draws_state
from siftune.methods.host.callback import around_steps
from siftune.models.adapters.full import original_weights
from siftune.models.layers import find_layers
from siftune.models.loss import Loss, model_loss
from siftune.models.modules import evaluating


@dataclass(frozen=True)
class LayerChoice:
    """One step's choice.

    Attributes:
        step: Optimizer steps before it.
        layers: Numbers of the layers that train, from the embeddings, ascending.
        importance: (L,) float64 importance logits of the layers with adapters; None for a policy without importance.
        moved: The importance has changed since the previous choice.
        losses: Losses of the candidate sets if this step scored them, else empty.
        rewards: Their rewards.
        suppressed: The candidate sets.
    """

    step: int
    layers: tuple[int, ...]
    importance: Tensor | None = None
    moved: bool = False
    losses: tuple[float, ...] = ()
    rewards: tuple[float, ...] = ()
    suppressed: tuple[tuple[int, ...], ...] = ()


class LayerStack(NamedTuple):
    """The layers that a policy chooses from."""

    # numbers of the layers with trainable parameters, from the embeddings, ascending; a policy refers to layers by
    # their positions in this tuple
    numbers: tuple[int, ...]
    depth: int  # number of layers of the model


Compare = Callable[[Tensor, float, int], Tensor]  # see LayerSelection.suppressed_losses


class LayerPolicy(ABC):
    """Chooses the layers of every step."""

    needs_rows: bool = False  # it compares layers on rows, which the driver must supply
    importance: Tensor | None = None  # (L,) float64 importance logits, high = important; None without importance

    @abstractmethod
    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Choose for the step after `step` optimizer steps; layers and sets are positions in the `LayerStack`."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state; none by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from a `state_dict()`."""


class LayerSelection:
    """A layer policy applied to a model, until `remove()`.

    In a custom loop use it as a context manager and call `step()` after every optimizer step, or pass the optimizer to
    `attach`, which then calls it.

    Args:
        model: Causal LM with adapters, PEFT-wrapped or not.
        policy: Makes the policy from the layers and the method's own generator.
        seed: Seed of that generator.
        draws: Rows for a policy that compares layers.
        loss: Loss of a batch, a scalar; by default the model's own.
        layers: Path of the decoder layers in `model`, if their structure does not identify them.
        chunk: Rows per forward pass when layers are compared.
        alive: Whether the training is still running; if not, the next pass removes the gates.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Callable[[LayerStack, torch.Generator], LayerPolicy],
        *,
        seed: int = 0,
        draws: Draws | None = None,
        loss: Loss = model_loss,
        layers: str | None = None,
        chunk: int = 16,
        alive: Alive = always,
    ) -> None:
        self.model = model
        self.groups = group_by_layer(model, layers)
        self.generator = torch.Generator().manual_seed(seed)
        numbers = tuple(group.index for group in self.groups)
        self.policy = policy(LayerStack(numbers, len(find_layers(model, layers).layers)), self.generator)
        self.draws = draws
        self.loss = loss
        self.steps = 0
        self.last: LayerChoice | None = None
        self._chunk = chunk
        self._handles: list[Any] = []
        if self.policy.needs_rows:
            refuse_taken_apart(model)
            for group in self.groups:
                if original_weights(group.module) is None:
                    adapted_modules(group)  # now, not at the first scoring
        self._gates = LayerGates(model, self.groups, deliver_zeros=in_group(), alive=alive)

    @property
    def importance(self) -> Tensor | None:
        """(L,) float64 importance logits, high = important; None for a policy without importance."""
        return self.policy.importance

    @property
    def idle(self) -> frozenset[int]:
        """Numbers of the layers with trainable parameters that do not train now."""
        return frozenset(group.index for group in self.groups) - self._gates.active

    def begin(self) -> LayerChoice:
        """Choose the layers of the next step."""
        choice = self.policy.choose(self.steps, self.suppressed_losses)
        sets = tuple(self._numbers(positions) for positions in choice.suppressed)
        self.last = replace(choice, layers=self._numbers(choice.layers), suppressed=sets)
        self._gates.set_active(self.last.layers)
        return self.last

    def drop_inactive_grads(self) -> None:
        """Set the gradients of inactive layers to None; call it before an optimizer step."""
        self._gates.drop_inactive_grads()

    def step(self) -> LayerChoice:
        """Count an optimizer step, and choose the layers of the next."""
        self.steps += 1
        return self.begin()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `drop_inactive_grads()` before and `step()` after every step of `optimizer`."""
        self._handles += around_steps(optimizer, self.drop_inactive_grads, self.step)

    def on_remove(self, handle: Any) -> None:
        """Remove another handle together with the selection."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Remove all hooks from the model and the optimizer; a second call has no effect."""
        self._gates.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state between two optimizer steps: the policy's, layers, generator, steps."""
        return {
            "steps": self.steps,
            "layers": list(self.last.layers) if self.last else None,
            **draws_state(self.generator, self.draws),
            **self.policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, as if never interrupted."""
        self.steps = int(state["steps"])
        self.policy.load_state_dict(state)
        load_draws_state(state, self.generator, self.draws)
        if state["layers"]:  # of the next step in a custom loop; a Trainer's callback draws anew
            self._gates.set_active(state["layers"])
            self.last = LayerChoice(self.steps, tuple(state["layers"]), self.importance)

    def __enter__(self) -> "LayerSelection":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def suppressed_losses(self, sets_KN: Tensor, factor: float, rows: int) -> Tensor:
        """Losses on drawn rows with the adapters of one set of layers damped at a time.

        Args:
            sets_KN: (K, N) int64 positions of layers.
            factor: Factor for their adapter response.
            rows: Number of rows to draw.

        Returns:
            (K,) float64, the mean over the ranks: the same bits on each of them.
        """
        assert self.draws is not None
        batches = self.draws.draw(rows, self._chunk)
        weights = [label_weight(batch) for batch in batches]
        losses: list[Tensor] = []
        with evaluating(self.model):
            for layers in sets_KN.tolist():
                with suppress(self.groups, layers, factor):
                    losses += [self.loss(self.model, batch) for batch in batches]
        means = []
        for own in torch.stack(losses).view(len(sets_KN), -1).tolist():  # the host waits for the device once
            weighted = [w * loss for w, loss in zip(weights, own, strict=True) if w > 0]
            means.append(sum(weighted) / sum(weights) if weighted else float("nan"))
        return mean_over_ranks(torch.tensor(means, dtype=torch.float64), next(self.model.parameters()).device)

    def _numbers(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the layers at some positions; layers without adapters are not in `groups`."""
        return tuple(self.groups[position].index for position in positions)
