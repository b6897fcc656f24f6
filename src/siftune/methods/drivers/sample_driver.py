"""Sample selection on one model: support gradient, seeds, draws and tape, step by step.

The callbacks drive a `SampleSelection`, and their `attach` returns it for a custom training loop. A `SampleRule`
chooses the samples: GAST for every layer; a rule that reduces all layers at once chooses once for the model.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base import numerics
from siftune.base.ranks import rank, world_size
from siftune.engine.gate import Alive, always, is_active
from siftune.engine.groups import LayerGroup, group_by_layer
from siftune.engine.survey import Survey
from siftune.engine.tape import SampleGradients, Tape
from siftune.methods.drivers.batches import Draws, draws_state, load_draws_state
from siftune.methods.drivers.sample_choice import ALL_LAYERS, Choosing, SampleChoice, Unit
from siftune.methods.drivers.support import Gradients, Support, support_gradient
from siftune.methods.host.callback import around_steps
from siftune.methods.host.row_numbers import RowNumbers
from siftune.methods.options import count_of
from siftune.models.loss import Loss, model_loss
from siftune.models.quantised import KeptUnpacked, refuse_packed

logger = logging.getLogger(__name__)


class SampleRule(ABC):
    """Chooses samples, and adds up their gradients.

    Args:
        units: Units of the choice, from the embeddings.
        select: Samples to follow in a batch: a count or a share.
    """

    at_once: bool = False  # reduce all layers at once, after backward has passed all of them
    always: bool = False  # call `reduce` even if all samples are followed
    support: Support | None = None  # the support set, if it has rows of its own
    until: int | None = None  # optimizer step from which all samples are followed

    def __init__(self, units: Sequence[Unit], select: int | float) -> None:
        self.units = units
        self.select = select

    def follows_all(self, steps: int) -> bool:
        """Whether selection has ended after `steps` optimizer steps."""
        return self.until is not None and steps >= self.until

    @abstractmethod
    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose samples for some layers, note the choice, and add up their gradients."""

    def end(self) -> None:
        """End a step, whose gradients are complete, before the optimizer steps."""
        if self.support is not None:
            self.support.end()


def summed(grads: SampleGradients, chosen_K: Tensor, factor: Tensor) -> Gradients:
    """Sum of the gradients of the chosen samples times a factor, a scalar."""
    parts = [*grads.values()]
    slab_SD = numerics.joined(parts)
    sums_D = numerics.sum_of(slab_SD, chosen_K.to(slab_SD.device)) * factor.to(slab_SD.device)
    return dict(zip(grads, numerics.split_like(sums_D, parts), strict=True))


class SampleSelection:
    """A sample rule applied to a model, until `remove()`.

    In a custom loop use it as a context manager. If the method depends on optimizer steps (all but GAST's support
    "rest"), call `step()` after each, or pass the optimizer to `attach`.

    Args:
        model: Causal LM with adapters, PEFT-wrapped or not.
        rule: Makes the rule from the layers.
        seed: Seed of the method's own generator.
        draws: Rows for the support set, if the rule has one.
        loss: Loss of a batch, a scalar; by default the model's own.
        layers: Path of the decoder layers in `model`, if their structure does not identify them.
        chunk: Rows per forward pass over the support set.
        pairs: Row i and row i + B/2 of a batch are one sample.
        compiled: The model will be called compiled.
        alive: Whether the training is still running; if not, the next pass removes the tape.
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
        alive: Alive = always,
    ) -> None:
        self.model = model
        self.groups = group_by_layer(model, layers)
        self.rule = rule(self.groups)
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = draws
        self.loss = loss
        self.steps = 0
        self.numbers: RowNumbers | None = None  # of the batches' rows, in a Trainer
        self._chunk = chunk
        self.choosing: Choosing | None = None  # in the last batch
        self._seed: int | None = None  # of the step; None before the first
        self._opened: dict[str, Any] | None = None  # state of the draws before the step; None after it
        self._next_batch = 0
        self._logged_few = False
        self._handles: list[Any] = []
        survey = Survey(self.groups)
        if compiled or hasattr(model, "_orig_mod"):
            survey.refuse_compiled("the model")
        refuse_packed(model)
        self._tape = Tape(survey, self._begin_pass, self.rule.reduce, pairs, self.rule.at_once, alive)
        self._handles.append(KeptUnpacked(model))

    @property
    def last(self) -> SampleChoice | None:
        """The choice in the last batch after its backward pass; None before."""
        return self.choosing.done() if self.choosing else None

    def begin(self) -> None:
        """Draw the seed of the next step, and its support set if there is one."""
        self._opened = draws_state(self.generator, self.draws)
        if self._seed is not None:  # else it may resume within a step
            self._next_batch = 0
        self._seed = int(torch.randint(2**62, (), generator=self.generator))
        if self.rule.support is not None and not self.rule.follows_all(self.steps):
            self.rule.support.begin(self.steps, partial(self._support_gradient, self.rule.support.size, self._seed))

    def begin_before_forward(self) -> None:
        """Begin the first step of a loop, or of a resumed one, before the model's forward pass.

        Within it, the pass over the support set would run inside hooks that the caller has put on the model.
        """

        def begin(*_: Any) -> None:
            if self._seed is None and torch.is_grad_enabled():  # no evaluation
                self.begin()

        self._handles.append(self.model.register_forward_pre_hook(begin, prepend=True))

    def end(self) -> None:
        """End a step, whose gradients are complete. Call it before the optimizer steps."""
        self.rule.end()
        self._opened = None

    def step(self) -> None:
        """Count an optimizer step, and begin the next."""
        self.steps += 1
        self.begin()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `end()` before and `step()` after every step of `optimizer`."""
        self._handles += around_steps(optimizer, self.end, self.step)

    def remove(self) -> None:
        """Remove all hooks from the model and the optimizer; a second call has no effect."""
        self._tape.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.rule.support is not None:
            self.rule.support.gradients = {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: generator, steps, and the passes of the current step, which begins again.

        Take it between two optimizer steps, or between two passes in a loop without steps. A running mean is in
        `mean_tensors`.
        """
        if self._opened is None:
            return {"steps": self.steps, "passes": 0, **draws_state(self.generator, self.draws)}
        return {"steps": self.steps, "passes": self._next_batch, **self._opened}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, as if never interrupted."""
        self.steps = int(state["steps"])
        self._seed, self._opened, self._next_batch = None, None, int(state["passes"])
        load_draws_state(state, self.generator, self.draws)

    def mean_tensors(self) -> dict[str, Tensor]:
        """The running mean of the support gradients, by name of the parameter; empty without one."""
        names, support = self._names(), self.rule.support
        return {} if support is None else {names[p]: mean for p, mean in support.average.items()}

    def load_mean_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with the running mean of `mean_tensors()`."""
        if self.rule.support is not None:
            names = self._names()
            self.rule.support.average = {p: tensors[name].to(p.device) for p, name in names.items() if name in tensors}

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
        """Start on a batch: draw all its uniform numbers; None if all samples are followed."""
        if self._seed is None:
            self.begin()
        assert self._seed is not None
        number = self._next_batch * world_size() + rank()
        self._next_batch += 1
        count = count_of(self.rule.select, samples)
        generator = torch.Generator().manual_seed((self._seed + number) % 2**63)
        uniform = torch.rand(len(self.rule.units), samples, generator=generator, dtype=torch.float64)
        self.choosing = Choosing(self.steps, number, samples, count, uniform)
        if self.numbers is not None and self.numbers.rows is not None and len(self.numbers.rows) == samples:
            self.choosing.rows = self.numbers.rows
        if not self.rule.follows_all(self.steps) and (count < samples or self.rule.always):
            return self.choosing
        self._follow_all(self.choosing)
        return None

    def _follow_all(self, choosing: Choosing) -> None:
        """Note that a batch has nothing to choose, and log it once."""
        active = {group.index for group in self.groups if is_active(group)} | {ALL_LAYERS}
        for unit in self.rule.units:
            if unit.layer in active:
                choosing.note(unit, None, torch.arange(choosing.samples))
        if not self._logged_few and not self.rule.follows_all(self.steps):
            self._logged_few = True
            logger.info(
                "a batch has %d samples, no more than are to be selected: all of them are followed", choosing.samples
            )
