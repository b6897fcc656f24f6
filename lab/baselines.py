"""Two reference implementations of GAST's row selection, to compare siftune's engine with.

    TwoPass    GAST in two passes: the first scores the rows for every layer and stores inner products only, the second
               computes the gradients of the chosen rows.
    StoreAll   GAST in one pass that keeps every row's gradient for every matrix until backward has ended.

Both make the same choices as siftune's `GAST`, number for number. They support only PEFT's plain LoRA on linear modules
in the decoder layers, in one process.

Shapes: B rows, T positions, I inputs, O outputs, K chosen rows, N = K·T, L layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from siftune.base import numerics
from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.ranks import world_size
from siftune.engine import kinds as per_sample
from siftune.engine.groups import group_by_layer, outside
from siftune.methods.drivers.batches import Draws, RowDraws
from siftune.methods.drivers.support import support_gradient
from siftune.methods.gast import maths
from siftune.methods.gast.maths import Scored, score_samples
from siftune.methods.options import GASTSettings, count_of
from siftune.models.loss import Batch, Loss, model_loss
from siftune.train.trainer import SiftTrainer

Read = Callable[[nn.Linear, Tensor, Tensor], Tensor | None]  # matrix, output's gradient, input -> weight's gradient
Run = Callable[[Batch], Tensor]  # forward and backward on a batch; returns the loss


@dataclass(frozen=True)
class Choice:
    """The choice in one batch.

    Attributes:
        scores: (L, B).
        selected: (L, K) int64 row numbers, ascending.
    """

    scores: Tensor
    selected: Tensor


class Baseline(ABC):
    """Base of both. Call `begin()` before every optimizer step, and `step()` for every batch.

    Args:
        model: Causal LM with LoRA, as PEFT attaches it.
        settings: GAST's settings.
        draws: Support rows, where the settings ask for them.
        loss: Loss of the support rows, a scalar.
        chunk: Rows per forward pass over them.
        seed: Seed of the draws.

    Attributes:
        last: The choice in the last batch; None before, and if all rows were followed.

    Raises:
        UnsupportedError: A trainable parameter is no LoRA matrix of a linear module, or there are several processes.
        RecipeError: Only siftune's own `GAST` supports these settings.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: GASTSettings,
        draws: Draws | None = None,
        loss: Loss = model_loss,
        chunk: int = 16,
        seed: int = 0,
    ) -> None:
        _refuse_settings(type(self).__name__, settings)
        if world_size() > 1:
            raise UnsupportedError(f"{type(self).__name__} is a reference for one process; {world_size()} are at work")
        self.model, self.settings, self.draws, self.loss, self.chunk = model, settings, draws, loss, chunk
        self.layers = lora_matrices(model)
        self.matrices = [matrix for layer in self.layers for matrix in layer]
        self.generator = torch.Generator().manual_seed(seed)
        self.last: Choice | None = None
        self.support: dict[nn.Parameter, Tensor] = {}
        self._seed: int | None = None
        self._batches = 0

    def begin(self) -> None:
        """Draw the step's numbers and support rows in the order in which GAST draws them."""
        self._seed = int(torch.randint(2**62, (), generator=self.generator))
        self._batches = 0
        if self.settings.needs_rows:
            if self.draws is None:
                raise RecipeError('support="sample" compares with rows: give draws=..., or set support="rest"')
            rows = self.draws.draw(self.settings.support_size, self.chunk)
            wanted = [matrix.weight for matrix in self.matrices]
            self.support = support_gradient(self.model, rows, self.loss, wanted, self._seed)

    def step(self, batch: Batch, run: Run) -> Tensor:
        """Add the gradients of the chosen rows to the parameters' `grad`.

        Args:
            batch: Tensors of B rows, `input_ids` among them.
            run: Runs the model forward and backward on a batch and returns the loss.

        Returns:
            The loss that `run` returned in the pass that formed the gradients.
        """
        if self._seed is None:
            self.begin()
        rows = len(batch["input_ids"])
        count = count_of(self.settings.select, rows)
        uniform_LB = self._uniform(rows)
        self.last = None
        if count == rows:
            return run(batch)
        return self._select(batch, run, count, uniform_LB)

    @abstractmethod
    def _select(self, batch: Batch, run: Run, count: int, uniform_LB: Tensor) -> Tensor:
        """Choose `count` rows with these uniform numbers, and form the gradients of those; see `step`."""

    def _uniform(self, rows: int) -> Tensor:
        """The numbers that GAST would draw for this batch, (L, B)."""
        assert self._seed is not None
        generator = torch.Generator().manual_seed((self._seed + self._batches) % 2**63)
        self._batches += 1
        return torch.rand(len(self.layers), rows, generator=generator, dtype=torch.float64)

    def _support_of(self, matrix: nn.Linear) -> list[Tensor] | None:
        """Support gradient of a matrix; None: the other rows."""
        if self.settings.support == "rest":
            return None
        return [self.support.get(matrix.weight, torch.zeros_like(matrix.weight))]

    def _choose(self, scored: Sequence[Scored], count: int, uniform_LB: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Choose for every layer: its rows, and the factor on the sum of their gradients."""
        chosen = []
        for layer, uniform_B in zip(scored, uniform_LB, strict=True):
            uniform_B = uniform_B.to(layer.scores.device)
            rows_K = maths.choose(layer.scores, layer.live, uniform_B, count, self.settings)
            chosen.append((rows_K, maths.factor(layer.live, rows_K)))
        self.last = Choice(torch.stack([s.scores for s in scored]), torch.stack([rows_K for rows_K, _ in chosen]))
        return chosen


class TwoPass(Baseline):
    """GAST in two passes: memory of dense training, most of its time twice."""

    def _select(self, batch: Batch, run: Run, count: int, uniform_LB: Tensor) -> Tensor:
        parts: dict[nn.Linear, Scored] = {}
        with randomness_kept(self.model), reading(self.matrices, batch["input_ids"], partial(self._score, parts)):
            run(batch)
        scored = [_added([parts[matrix] for matrix in layer]) for layer in self.layers]
        chosen = self._choose(scored, count, uniform_LB)
        rows_of = {matrix: pick for layer, pick in zip(self.layers, chosen, strict=True) for matrix in layer}
        with reading(self.matrices, batch["input_ids"], partial(gradient_of_chosen, rows_of)):
            return run(batch)

    def _score(self, parts: dict[nn.Linear, Scored], matrix: nn.Linear, grad_BTO: Tensor, input_BTI: Tensor) -> None:
        """Keep what a matrix adds to its layer's scores; inner products over several matrices add up."""
        parts[matrix] = score_samples([per_sample.linear_weight(grad_BTO, input_BTI)], self._support_of(matrix))


class StoreAll(Baseline):
    """GAST in one pass: time of dense training, and memory for the gradients of all rows for all matrices."""

    def _select(self, batch: Batch, run: Run, count: int, uniform_LB: Tensor) -> Tensor:
        kept: dict[nn.Linear, Tensor] = {}

        def keep(matrix: nn.Linear, grad_BTO: Tensor, input_BTI: Tensor) -> None:
            kept[matrix] = per_sample.linear_weight(grad_BTO, input_BTI)

        with reading(self.matrices, batch["input_ids"], keep):
            loss = run(batch)
        scored = [_added([score_samples([kept[m]], self._support_of(m)) for m in layer]) for layer in self.layers]
        for layer, (rows_K, factor) in zip(self.layers, self._choose(scored, count, uniform_LB), strict=True):
            for matrix in layer:
                reduced = (numerics.sum_of(kept[matrix], rows_K) * factor).to(matrix.weight.dtype)
                before = matrix.weight.grad
                matrix.weight.grad = reduced if before is None else before + reduced
        return loss


def _added(parts: Sequence[Scored]) -> Scored:
    """A layer's scores from those of its matrices."""
    return Scored(numerics.added([p.scores for p in parts]), torch.stack([p.live for p in parts]).any(0))


def _refuse_settings(name: str, settings: GASTSettings) -> None:
    known = {"support": ("rest", "sample"), "choice": ("stochastic", "topk"), "score": ("inner",)}
    for key, values in known.items():
        if getattr(settings, key) not in values:
            raise RecipeError(
                f"{name} is a reference with {key} {' or '.join(values)}, not {getattr(settings, key)}; "
                "siftune's GAST does the others"
            )


class BaselineTrainer(SiftTrainer):
    """siftune's Trainer with the passes of a baseline as its training step."""

    baseline: Baseline
    _begun = -1  # the step for which the baseline has drawn

    @classmethod
    def take_over(
        cls, trainer: SiftTrainer, kind: type[Baseline], settings: GASTSettings, seed: int = 0
    ) -> "BaselineTrainer":
        """Turn a Trainer that is set up for dense training into one that selects; everything else stays as is."""
        trainer.__class__ = cls
        chunk = trainer.args.per_device_train_batch_size
        trainer.baseline = kind(trainer.model, settings, loss=trainer.support_loss, chunk=chunk, seed=seed)
        trainer.baseline.draws = RowDraws(trainer.train_dataset, trainer.data_collator, trainer.baseline.generator)
        return trainer

    def support_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of support rows, as the Trainer computes that of its own."""
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, self._prepare_inputs(dict(batch)))
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Select, with as many forward and backward passes as the baseline makes."""

        def run(batch: Batch) -> Tensor:
            loss: Tensor = super(BaselineTrainer, self).training_step(model, dict(batch), num_items_in_batch)
            return loss

        if self._begun != self.state.global_step:
            self._begun = self.state.global_step
            model.train()  # an evaluation leaves it in eval mode
            self.baseline.begin()
        return self.baseline.step(inputs, run)


class ReadLinear(torch.autograd.Function):
    """y = x Wᵀ with the weight's gradient from `read`; the input's gradient is that of all rows."""

    @staticmethod
    def forward(ctx: Any, read: Callable[[Tensor, Tensor], Tensor | None], given: Tensor, weight: Tensor) -> Tensor:
        """Multiply; `read(output's gradient, input)` is called in backward."""
        ctx.read = read
        ctx.save_for_backward(given, weight)
        return nn.functional.linear(given, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        """Pass the gradient on to the input, and return what was read for the weight."""
        given, weight = ctx.saved_tensors
        to_input = (grads[0] @ weight.to(grads[0].dtype)).to(given.dtype) if ctx.needs_input_grad[1] else None
        return None, to_input, ctx.read(grads[0], given)


@contextmanager
def reading(matrices: Sequence[nn.Linear], ids_BT: Tensor, read: Read) -> Iterator[None]:
    """Let `read` compute the gradients of LoRA matrices in one forward and backward pass over some rows.

    Args:
        matrices: The matrices; each has to be used once.
        ids_BT: The rows' token numbers.
        read: Given a matrix, the gradient (B, T, O) of its output, and its input (B, T, I).

    Raises:
        UnsupportedError: The input of a matrix is not one sequence per row, or the matrix is not used exactly once.
    """
    calls: list[nn.Linear] = []
    rows, positions = ids_BT.shape

    def forward(matrix: nn.Linear, given: Tensor) -> Tensor:
        if torch.is_grad_enabled() and given.shape[:-1] not in ((rows, positions), (rows * positions,)):
            raise UnsupportedError(
                f"a LoRA matrix works on a tensor of shape {tuple(given.shape)} in a batch of {rows} rows and "
                f"{positions} positions, so the rows' gradients cannot be told apart"
            )
        return ReadLinear.apply(partial(note, matrix), given, matrix.weight)

    def note(matrix: nn.Linear, grad: Tensor, given: Tensor) -> Tensor | None:
        calls.append(matrix)
        return read(matrix, grad.reshape(rows, positions, -1), given.reshape(rows, positions, -1))

    try:
        for matrix in matrices:
            matrix.forward = partial(forward, matrix)
        yield
    finally:
        for matrix in matrices:
            vars(matrix).pop("forward", None)
    if sorted(map(id, calls)) != sorted(map(id, matrices)):
        raise UnsupportedError(
            f"backward came by {len(calls)} uses of {len(matrices)} LoRA matrices; every matrix has to be used once"
        )


@contextmanager
def randomness_kept(model: nn.Module) -> Iterator[None]:
    """Leave the global generators as they were, so that a second pass has the same dropout."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def gradient_of_chosen(
    rows_of: dict[nn.Linear, tuple[Tensor, Tensor]], matrix: nn.Linear, grad_BTO: Tensor, input_BTI: Tensor
) -> Tensor:
    """Gradient of a weight from some rows.

    Args:
        rows_of: matrix -> its rows (K,), and a factor on the sum over them.
        matrix: The matrix.
        grad_BTO: Gradient of its output.
        input_BTI: Its input.
    """
    rows_K, factor = rows_of[matrix]
    grad_NO, input_NI = grad_BTO[rows_K].flatten(0, 1), input_BTI[rows_K].flatten(0, 1)
    return grad_NO.T @ input_NI.to(grad_NO.dtype) * factor.to(grad_NO.dtype)


def lora_matrices(model: nn.Module) -> list[list[nn.Linear]]:
    """The LoRA matrices of every layer that has some, as the modules that multiply with them.

    Raises:
        UnsupportedError: Something else trains.
    """
    layers = []
    groups = group_by_layer(model)
    for group in groups:
        found = [
            matrix
            for module in group.module.modules()
            if isinstance(module, LoraLayer)
            and not isinstance(module, ParamWrapper | MultiheadAttention)
            and not getattr(module, "lora_variant", {})
            for matrix in (*module.lora_A.values(), *module.lora_B.values())
            if type(matrix) is nn.Linear and matrix.weight.requires_grad
        ]
        known = {id(matrix.weight) for matrix in found}
        _refuse_others([f"{group.name}.{name}" for name, p in group.parameters.items() if id(p) not in known])
        layers.append(found)
    _refuse_others(list(outside(model, groups)))
    return layers


def _refuse_others(names: Sequence[str]) -> None:
    if names:
        raise UnsupportedError(
            f"{names[0]} trains ({len(names)} such parameters), but the baselines know plain LoRA on linear modules in "
            "the decoder layers only; attach such an adapter, or use siftune's GAST"
        )
