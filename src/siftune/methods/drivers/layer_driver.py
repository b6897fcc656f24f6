"""Layer selection at work on one model: a policy chooses, gates carry it out, step by step.

`LayerSelection` is what the Trainer callbacks drive, and what `attach` returns for a plain training loop. Which layers
train is the business of a `LayerPolicy`: IST draws by importance, RST, LISA and Cut draw at random.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siftune.base.numerics import gradient_norm, side_by_side
from siftune.engine.gate import LayerGates
from siftune.engine.groups import LayerGroup, group_by_layer
from siftune.engine.ranks import in_group, mean_over_ranks
from siftune.engine.suppression import refuse_taken_apart, suppress
from siftune.methods.drivers.batches import Batch, Draws, Loss, draws_state, label_weight, load_draws_state, model_loss
from siftune.methods.host.step_hooks import around_steps
from siftune.models.layers import find_layers
from siftune.models.modules import evaluating


@dataclass(frozen=True)
class LayerChoice:
    """One step's choice.

    Attributes:
        step: Optimizer steps done before it.
        layers: Numbers of the layers that train, from the embeddings, ascending.
        importance: (L,) float64 importance logits of the layers that have adapters; None where a policy has none.
        moved: The importance is another than at the choice before.
        losses: Losses of the candidate sets where this step scored them, else empty.
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

    # numbers of those that have something to train, from the embeddings, ascending; a policy names them by their
    # positions here
    numbers: tuple[int, ...]
    depth: int  # how many layers the model has


Compare = Callable[[Tensor, float, int], Tensor]  # see LayerSelection.suppressed_losses


class LayerPolicy(ABC):
    """Who chooses the layers: an object, with state where it has any."""

    needs_rows: bool = False  # it compares layers on rows, so that the driver needs some
    needs_norms: bool = False  # it is shown the norms of the layers' gradients; see `observe`
    drops_state: bool = False  # the optimizer is to forget the layers that leave
    importance: Tensor | None = None  # (L,) float64 importance logits, high = important; None where it goes by none

    @abstractmethod
    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Choose for the step after `step` optimizer steps; layers and sets are positions in the `LayerStack`."""

    def observe(self, positions_N: Tensor, norms_N: Tensor) -> None:  # noqa: B027
        """Take note of the gradients of the layers that train, just before an optimizer step.

        Args:
            positions_N: (N,) int64 positions of these layers, ascending.
            norms_N: (N,) float64 norm of each one's gradient: of the whole step, over all ranks, after clipping.
        """

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state; none by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from a `state_dict()`."""


class LayerSelection:
    """A layer policy at work on a model, until `remove()`.

    In a plain loop use it as a context manager and call `step()` after every optimizer step, or give `attach` the
    optimizer, which then calls it.

    Args:
        model: Causal LM with adapters, PEFT-wrapped or not.
        policy: Makes the policy from the layers and the method's own generator.
        seed: Seed of that generator.
        draws: Rows for a policy that compares layers on some.
        loss: Loss of a batch, a scalar; by default the model's own.
        layers: Path of the decoder layers in `model`, where they are not found by structure.
        chunk: Rows per forward pass when layers are compared.
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
    ) -> None:
        self.model = model
        self.groups = group_by_layer(model, layers)
        self.generator = torch.Generator().manual_seed(seed)
        numbers = tuple(group.index for group in self.groups)
        self.policy = policy(LayerStack(numbers, len(find_layers(model, layers).layers)), self.generator)
        self.draws = draws
        self.loss = loss
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = 0
        self.last: LayerChoice | None = None
        self._chunk = chunk
        self._handles: list[Any] = []
        if self.policy.needs_rows:
            refuse_taken_apart(model)
        self._gates = LayerGates(model, self.groups, deliver_zeros=in_group())

    @property
    def importance(self) -> Tensor | None:
        """(L,) float64 importance logits, high = important; None where the policy has none."""
        return self.policy.importance

    @property
    def idle(self) -> frozenset[int]:
        """Numbers of the layers that have something to train, and do not train now."""
        return frozenset(group.index for group in self.groups) - self._gates.active

    def begin(self) -> LayerChoice:
        """Choose the layers of the coming step."""
        choice = self.policy.choose(self.steps, self.suppressed_losses)
        sets = tuple(self._numbers(positions) for positions in choice.suppressed)
        self.last = replace(choice, layers=self._numbers(choice.layers), suppressed=sets)
        self._gates.set_active(self.last.layers)
        if self.policy.drops_state and self.optimizer is not None:
            for parameter in self._gates.inactive_parameters():
                self.optimizer.state.pop(parameter, None)
        return self.last

    def drop_inactive_grads(self) -> None:
        """Set the gradients of inactive layers to None; call it before an optimizer step."""
        self._gates.drop_inactive_grads()

    def before_update(self) -> None:
        """Do what is due just before an optimizer step, when gradients are whole: the Trainer's callback calls it."""
        self.drop_inactive_grads()
        active = self._active_groups()
        seen = any(p.grad is not None for group in active.values() for p in group.parameters.values())
        if self.policy.needs_norms and seen:  # of a step that is left out there is none
            norms = side_by_side([gradient_norm(group.parameters.values()) for group in active.values()])
            self.policy.observe(torch.tensor(list(active)), norms.to("cpu").to(torch.float64))

    def step(self) -> LayerChoice:
        """Note that an optimizer step is done, and choose the layers of the next."""
        self.steps += 1
        return self.begin()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Do `before_update()` before, and `step()` after every step of `optimizer`."""
        self.optimizer = optimizer
        self._handles += around_steps(optimizer, self.before_update, self.step)

    def on_remove(self, handle: Any) -> None:
        """Have a further handle removed together with the selection."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take everything off the model and the optimizer; calling it twice does no harm."""
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
        if layers := state.get("layers"):  # of the coming step in a plain loop; a Trainer's callback draws anew
            self._gates.set_active(layers)
            self.last = LayerChoice(self.steps, tuple(layers), self.importance)

    def __enter__(self) -> "LayerSelection":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def suppressed_losses(self, sets_KN: Tensor, factor: float, rows: int) -> Tensor:
        """Losses on drawn rows with the adapters of one set of layers damped at a time.

        Args:
            sets_KN: (K, N) int64 positions of layers.
            factor: What their adapter response is multiplied by.
            rows: How many rows to draw.

        Returns:
            (K,) float64, the mean over the ranks: the same bits on each of them.
        """
        assert self.draws is not None
        batches = self.draws.draw(rows, self._chunk)
        with evaluating(self.model):
            losses = [self._suppressed_loss(layers, factor, batches) for layers in sets_KN.tolist()]
        return mean_over_ranks(torch.tensor(losses, dtype=torch.float64), next(self.model.parameters()).device)

    def _numbers(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the layers at some positions: layers without adapters are not counted among `groups`."""
        return tuple(self.groups[position].index for position in positions)

    def _active_groups(self) -> dict[int, LayerGroup]:
        """The layers that train now, by position."""
        active = self._gates.active
        return {at: group for at, group in enumerate(self.groups) if group.index in active}

    def _suppressed_loss(self, layers: list[int], factor: float, batches: Sequence[Batch]) -> float:
        """Mean loss over the batches with the adapters of `layers` damped."""
        weights = [label_weight(batch) for batch in batches]
        with suppress(self.groups, layers, factor):
            losses = [float(self.loss(self.model, batch)) for batch in batches]
        weighted = [w * loss for w, loss in zip(weights, losses, strict=True) if w > 0]
        return sum(weighted) / sum(weights) if weighted else float("nan")
