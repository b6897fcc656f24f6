"""Sample selection at work on one model: support gradient, seeds, draws and tape, step by step.

`SampleSelection` is what the callbacks drive, and what their `attach` returns for a plain training loop. Which samples
are followed is the business of a `SampleRule`: GAST chooses for every layer, GREATS once for the model.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from siftune.base import numerics
from siftune.engine.gate import is_active
from siftune.engine.groups import LayerGroup, group_by_layer
from siftune.engine.kinds import refuse_compiled
from siftune.engine.ranks import rank, world_size
from siftune.engine.tape import SampleGradients, Tape
from siftune.methods.drivers.batches import Draws, Loss, draws_state, load_draws_state, model_loss
from siftune.methods.drivers.followed import how_many
from siftune.methods.drivers.sample_choice import WHOLE, Choosing, SampleChoice, Unit
from siftune.methods.drivers.support import Gradients, Support, support_gradient
from siftune.methods.host.row_numbers import RowNumbers
from siftune.methods.host.step_hooks import around_steps
from siftune.models.quantised import KeptUnpacked, refuse_packed

logger = logging.getLogger(__name__)


class Lasting(Protocol):
    """What is kept from batch to batch."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, or begin anew where it is empty."""


class SampleRule(ABC):
    """Who chooses the samples, and adds up their gradients: an object with state.

    Args:
        units: What chooses samples together, from the embeddings.
        select: Samples to follow in a batch: a count or a share.
    """

    whole: bool = False  # all layers are reduced at once, when backward has passed them all
    always: bool = False  # choose even where as many samples are to be followed as there are
    support: Support | None = None  # the support set, where its rows are drawn or given
    # what a rule keeps that chooses samples as they come; it takes one uniform number a unit and batch
    stream: Lasting | None = None
    # whose metric or learning rate the rule looks at, where the driver knows it
    optimizer: torch.optim.Optimizer | None = None
    planned: int | None = None  # optimizer steps of the whole run, where the driver knows them

    def __init__(self, units: Sequence[Unit], select: int | float) -> None:
        self.units = units
        self.select = select
        self._mean: Gradients = {}

    @property
    def keeps_mean(self) -> bool:
        """Whether a step's choice depends on gradients of earlier steps."""
        return self.support is not None and self.support.lasts

    @property
    def mean(self) -> Gradients:
        """What those gradients have been averaged to, by parameter: of all samples or of support sets."""
        return self._mean if self.support is None else self.support.average

    @mean.setter
    def mean(self, mean: Gradients) -> None:
        if self.support is None:
            self._mean = mean
        else:
            self.support.average = mean

    def follows_all(self, steps: int) -> bool:
        """Whether selection has ended after so many optimizer steps."""
        return False

    @abstractmethod
    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose samples for some layers, note the choice, and add up their gradients."""

    def end(self) -> None:  # noqa: B027
        """Note that the gradients of a step are complete, before the optimizer steps."""


def summed(grads: SampleGradients, chosen: Tensor, factor: Tensor) -> Gradients:
    """The gradients of chosen samples, their numbers or (S,) bool, added up and times a factor, a scalar."""
    return {p: numerics.sum_of(part, chosen.to(part.device)) * factor.to(part.device) for p, part in grads.items()}


class SampleSelection:
    """A sample rule at work on a model, until `remove()`.

    In a plain loop use it as a context manager. Where the method needs to know of optimizer steps (all but GAST's
    support "rest"), call `step()` after each, or give `attach` the optimizer.

    Args:
        model: Causal LM with adapters, PEFT-wrapped or not.
        rule: Makes the rule from the layers.
        seed: Seed of the method's own generator.
        draws: Rows for the support set, where the rule has one.
        loss: Loss of a batch, a scalar; by default the model's own.
        layers: Path of the decoder layers in `model`, where they are not found by structure.
        chunk: Rows per forward pass over the support set.
        pairs: Row i and row i + B/2 of a batch are one sample.
        compiled: The model will be called compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Callable[[Sequence[LayerGroup]], SampleRule],
        *,
        seed: int = 0,
        draws: Draws | None = None,
        loss: Loss = model_loss,
        layers: str | None = None,
        chunk: int = 16,
        pairs: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.groups = group_by_layer(model, layers)
        self.rule = rule(self.groups)
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = draws
        self.loss = loss
        self.steps = 0
        self.numbers: RowNumbers | None = None  # of the batches' rows, where a Trainer gives them
        self._chunk = chunk
        self._choosing: Choosing | None = None
        self._seed: int | None = None  # of the step; None before the first
        self._opened: dict[str, Any] | None = None  # state of the draws before the step; None after it
        self._next_batch = 0
        self._told_of_few = False
        self._handles: list[Any] = []
        if compiled or hasattr(model, "_orig_mod"):
            refuse_compiled(self.groups, "the model")
        refuse_packed(model)
        self._tape = Tape(self.groups, self._begin_pass, self.rule.reduce, pairs, self.rule.whole)
        self._handles.append(KeptUnpacked(model))

    @property
    def last(self) -> SampleChoice | None:
        """The choice in the last batch whose backward pass is done; None before."""
        return self._choosing.done() if self._choosing else None

    def begin(self) -> None:
        """Draw the seed of the coming step, and its support set where there is one."""
        self._opened = draws_state(self.generator, self.draws)
        if self._seed is not None:  # else a resume may have been within a step
            self._next_batch = 0
        self._seed = int(torch.randint(2**62, (), generator=self.generator))
        if self.rule.support is not None and not self.rule.follows_all(self.steps):
            self.rule.support.begin(self.steps, partial(self._support_gradient, self.rule.support.size, self._seed))

    def end(self) -> None:
        """Note that the gradients of a step are complete. Call it before the optimizer steps."""
        self.rule.end()
        self._opened = None

    def step(self) -> None:
        """Note that an optimizer step is done, and begin the next."""
        self.steps += 1
        self.begin()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Do `end()` before and `step()` after every step of `optimizer`."""
        self._handles += around_steps(optimizer, self.end, self.step)

    def on_remove(self, handle: Any) -> None:
        """Have a further handle on the model removed together with the selection."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take everything off the model and the optimizer; calling it twice does no harm."""
        self._tape.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.rule.support is not None:
            self.rule.support.gradients = {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: generator, steps, recent rows, passes of a step that has begun, which begins again.

        Take it between two optimizer steps, or between two passes where nothing tells of steps. A running mean is in
        `mean_tensors`.
        """
        kept = {} if self.rule.stream is None else {"stream": self.rule.stream.state_dict()}
        if self._opened is None:
            return {"steps": self.steps, "passes": 0, **draws_state(self.generator, self.draws), **kept}
        return {"steps": self.steps, "passes": self._next_batch, **self._opened, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, as if never interrupted."""
        self.steps = int(state["steps"])
        self._seed, self._opened, self._next_batch = None, None, int(state["passes"])
        load_draws_state(state, self.generator, self.draws)
        if self.rule.stream is not None:
            self.rule.stream.load_state_dict(state.get("stream", {}))

    def mean_tensors(self) -> dict[str, Tensor]:
        """The rule's running mean, by name of the parameter; empty where it has none."""
        names = self._names()
        return {names[p]: mean for p, mean in self.rule.mean.items()}

    def load_mean_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with the running mean of `mean_tensors()`."""
        self.rule.mean = {p: tensors[name].to(p.device) for p, name in self._names().items() if name in tensors}

    def __enter__(self) -> "SampleSelection":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _support_gradient(self, size: int, seed: int) -> Gradients:
        assert self.draws is not None
        batches = self.draws.draw(size, self._chunk)
        parameters = [p for group in self.groups for p in group.parameters.values()]
        with self._tape.paused():
            return support_gradient(self.model, batches, self.loss, parameters, seed)

    def _names(self) -> dict[nn.Parameter, str]:
        return {p: f"{group.name}.{name}" for group in self.groups for name, p in group.parameters.items()}

    def _begin_pass(self, samples: int) -> Choosing | None:
        """Start on a batch: draw all its uniform numbers; None where there is nothing to choose."""
        if self._seed is None:
            self.begin()
        assert self._seed is not None
        number = self._next_batch * world_size() + rank()
        self._next_batch += 1
        count = how_many(self.rule.select, samples)
        generator = torch.Generator().manual_seed((self._seed + number) % 2**63)
        wide = samples if self.rule.stream is None else 1
        uniform = torch.rand(len(self.rule.units), wide, generator=generator, dtype=torch.float64)
        self._choosing = Choosing(self.steps, number, samples, count, uniform)
        if self.numbers is not None and self.numbers.rows is not None and len(self.numbers.rows) == samples:
            self._choosing.rows = self.numbers.rows
        if not self.rule.follows_all(self.steps) and (count < samples or self.rule.always):
            return self._choosing
        self._follow_all(self._choosing)
        return None

    def _follow_all(self, choosing: Choosing) -> None:
        """Note that there is nothing to choose in a batch, and say so once."""
        active = {group.index for group in self.groups if is_active(group)} | {WHOLE}
        for unit in self.rule.units:
            if unit.layer in active:
                choosing.note(unit, None, torch.arange(choosing.samples))
        if not self._told_of_few and not self.rule.follows_all(self.steps):
            self._told_of_few = True
            logger.info(
                "a batch has %d samples, not more than are to be selected: all of them are followed", choosing.samples
            )
