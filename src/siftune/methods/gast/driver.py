"""Sample selection at work on one model: support gradient, scores, draws and tape, step by step.

`SampleSelection` is what the callback `GAST` drives, and what its `attach` returns for a plain training loop.
"""

import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from siftune.engine import per_sample
from siftune.engine.distributed import rank, sum_over_ranks, world_size
from siftune.engine.gate import is_active
from siftune.engine.groups import LayerGroup, group_by_layer
from siftune.engine.parameter_kinds import refuse_compiled
from siftune.engine.tape import Tape
from siftune.methods.batches import draws_state, load_draws_state
from siftune.methods.gast import maths
from siftune.methods.gast.choice import Choosing, Samples, Unit, units_of
from siftune.methods.gast.scores import Scored, live_samples, score_samples
from siftune.methods.gast.support import adam_metric, support_gradient
from siftune.methods.layer_driver import Draws, Loss, model_loss

logger = logging.getLogger(__name__)

Gradients = dict[nn.Parameter, Tensor]


class SampleSelection:
    """GAST on a model, until `remove()`.

    In a plain loop use it as a context manager. Where the method needs to know of optimizer steps (support "sample",
    "dataset" and "momentum"), call `step()` after each, or give `attach` the optimizer.

    Args:
        model: Causal LM with adapters, PEFT-wrapped or not.
        settings: The method's settings.
        draws: Rows for the support set; needed by "sample" and "dataset".
        loss: Loss of a batch, a scalar; by default the model's own.
        optimizer: Whose metric the score "preconditioned" takes.
        layers: Path of the decoder layers in `model`, where they are not found by structure.
        chunk: Rows per forward pass over the support set.
        pairs: Row i and row i + B/2 of a batch are one sample.
        compiled: The model will be called compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: maths.GASTSettings,
        *,
        draws: Draws | None = None,
        loss: Loss = model_loss,
        optimizer: torch.optim.Optimizer | None = None,
        layers: str | None = None,
        chunk: int = 16,
        pairs: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.settings = settings
        self.groups = group_by_layer(model, layers)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.draws = draws
        self.loss = loss
        self.optimizer = optimizer
        self.steps = 0
        self.mean: Gradients = {}
        self._chunk = chunk
        self._units = units_of(self.groups, settings.pool)
        self._support: Gradients = {}
        self._sums: Gradients = {}
        self._choosing: Choosing | None = None
        self._seed: int | None = None  # of the step; None before the first
        self._opened: dict[str, Any] | None = None  # state of the draws before the step; None after it
        self._next_batch = 0
        self._told_of_few = False
        self._handles: list[Any] = []
        if compiled or hasattr(model, "_orig_mod"):
            refuse_compiled(self.groups, "the model")
        self._tape = Tape(self.groups, self._begin_pass, self._reduce, pairs)

    @property
    def last(self) -> Samples | None:
        """The choice in the last batch whose backward pass is done; None before."""
        return self._choosing.done() if self._choosing else None

    def begin(self) -> None:
        """Draw the seed of the coming step, and its support set where there is one."""
        self._opened = draws_state(self.generator, self.draws)
        if self._seed is not None:  # else a resume may have been within a step
            self._next_batch = 0
        self._seed = int(torch.randint(2**62, (), generator=self.generator))
        if self.settings.needs_rows and not self._following_all:
            assert self.draws is not None
            batches = self.draws.draw(self.settings.support_size, self._chunk)
            wanted = [p for group in self.groups for p in group.parameters.values()]
            with self._tape.paused():
                self._support = support_gradient(self.model, batches, self.loss, wanted, self._seed)

    def end(self) -> None:
        """Note that the gradients of a step are complete: move the running mean. Call it before the optimizer steps."""
        if self.settings.support == "momentum" and self.settings.needs_scores:
            self._move_mean()
        self._opened = None

    def step(self) -> None:
        """Note that an optimizer step is done, and begin the next."""
        self.steps += 1
        self.begin()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Do `end()` before and `step()` after every step of `optimizer`."""
        self._handles += [
            optimizer.register_step_pre_hook(lambda *_: self.end()),
            optimizer.register_step_post_hook(lambda *_: self.step()),
        ]

    def remove(self) -> None:
        """Take everything off the model and the optimizer; calling it twice does no harm."""
        self._tape.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._support, self._sums = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: generator, steps, passes of a step that has begun, which begins again when this is loaded.

        Take it between two optimizer steps, or between two passes where nothing tells of steps. The running mean of
        "momentum" is in `mean_tensors`.
        """
        if self._opened is None:
            return {"steps": self.steps, "passes": 0, **draws_state(self.generator, self.draws)}
        return {"steps": self.steps, "passes": self._next_batch, **self._opened}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, as if never interrupted."""
        self.steps = int(state["steps"])
        self._seed, self._opened, self._next_batch = None, None, int(state.get("passes", 0))
        load_draws_state(state, self.generator, self.draws)

    def mean_tensors(self) -> dict[str, Tensor]:
        """The running mean of "momentum", by name of the parameter; empty for other support modes."""
        names = self._names()
        return {names[p]: mean for p, mean in self.mean.items()}

    def load_mean_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with the running mean of `mean_tensors()`."""
        self.mean = {p: tensors[name].to(p.device) for p, name in self._names().items() if name in tensors}

    def __enter__(self) -> "SampleSelection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _names(self) -> dict[nn.Parameter, str]:
        return {p: f"{group.name}.{name}" for group in self.groups for name, p in group.parameters.items()}

    def _begin_pass(self, samples: int) -> Choosing | None:
        """Start on a batch: draw all its uniform numbers; None where there is nothing to choose."""
        if self._seed is None:
            self.begin()
        assert self._seed is not None
        number = self._next_batch * world_size() + rank()
        self._next_batch += 1
        count = maths.how_many(self.settings.select, samples)
        generator = torch.Generator().manual_seed((self._seed + number) % 2**63)
        total = sum(len(units) for units in self._units.values())
        uniform = torch.rand(total, samples, generator=generator, dtype=torch.float64)
        self._choosing = Choosing(self.steps, number, samples, count, uniform)
        if not self._following_all and (count < samples or self.settings.replacement):
            return self._choosing
        self._follow_all(self._choosing)
        return None

    @property
    def _following_all(self) -> bool:
        """Whether selection has not begun yet."""
        return self.steps < self.settings.select_after

    def _follow_all(self, choosing: Choosing) -> None:
        """Note that there is nothing to choose in a batch, and say so once."""
        for group in self.groups:
            for unit in self._units[group.index] if is_active(group) else ():
                choosing.note(unit, None, torch.arange(choosing.samples))
        if not self._told_of_few and not self._following_all:
            self._told_of_few = True
            logger.info(
                "a batch has %d samples, not more than are to be selected: all of them are followed", choosing.samples
            )

    def _reduce(self, choosing: Choosing, group: LayerGroup, grads: Gradients) -> Gradients:
        """Choose the samples that a layer follows, and add up their gradients."""
        reduced: Gradients = {}
        for unit in self._units[group.index]:
            kept = [p for p in unit.parameters if p in grads]
            if not kept:
                continue
            parts = [grads[p] for p in kept]
            scored = self._score(kept, parts)
            chosen_K = self._choose(choosing, unit, scored)
            scale = maths.factor(scored.live, chosen_K, self.settings.scale)
            scale = torch.where(torch.isfinite(scored.scores).all(), scale, torch.nan)
            for parameter, part in zip(kept, parts, strict=True):
                reduced[parameter] = per_sample.sum_of(part, chosen_K) * scale
        return reduced

    def _choose(self, choosing: Choosing, unit: Unit, scored: Scored) -> Tensor:
        uniform_S = choosing.uniform_on(scored.scores.device)[unit.place]
        chosen_K = maths.choose(scored.scores, scored.live, uniform_S, choosing.count, self.settings)
        choosing.note(unit, scored.scores if self.settings.needs_scores else None, chosen_K)
        return chosen_K

    def _score(self, parameters: Sequence[nn.Parameter], parts: Sequence[Tensor]) -> Scored:
        """Score the samples of a batch for one unit."""
        settings = self.settings
        if not settings.needs_scores:
            live_S = live_samples(parts)
            return Scored(torch.zeros_like(live_S, dtype=torch.float32), live_S)
        support: list[Tensor] | None = None
        if settings.support != "rest":
            held = self.mean if settings.support == "momentum" else self._support
            support = [held[p] if p in held else torch.zeros_like(g[0]) for p, g in zip(parameters, parts, strict=True)]
        metric = None
        if settings.score == "preconditioned":
            assert self.optimizer is not None
            metric = [adam_metric(self.optimizer, p) for p in parameters]
        moving = settings.support == "momentum"
        scored = score_samples(parts, support, metric, settings.score == "cosine", totals=moving)
        if moving:
            self._add_to_sums(parameters, scored.totals)
        return scored

    def _add_to_sums(self, parameters: Sequence[nn.Parameter], totals: Sequence[Tensor]) -> None:
        for parameter, flat in zip(parameters, totals, strict=True):
            total = flat.view_as(parameter)
            self._sums[parameter] = self._sums[parameter] + total if parameter in self._sums else total

    def _move_mean(self) -> None:
        """Take this step's gradients of all samples, on all ranks, into the running mean of the active layers."""
        parameters = [p for group in self.groups if is_active(group) for p in group.parameters.values()]
        totals = [self._sums[p] if p in self._sums else torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        recorded = torch.full((1,), float(bool(self._sums)), device=totals[0].device)
        self._sums = {}
        *totals, recorded = sum_over_ranks([*totals, recorded])
        if not bool(recorded):  # every sample was followed, so that no gradients of samples were formed
            return
        if bool(torch.isfinite(torch.stack(torch._foreach_norm(totals))).all()):
            for parameter, total in zip(parameters, totals, strict=True):
                before = self.mean[parameter] if parameter in self.mean else torch.zeros_like(total)
                self.mean[parameter] = before.lerp(total, 1 - self.settings.decay)
