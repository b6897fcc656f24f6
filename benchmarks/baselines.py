"""Other ways to select rows by their gradients, written plainly: what siftune's engine is compared with.

    TwoPass    GAST in two passes: the first scores the rows for every layer and keeps inner products only, the second
               forms the gradients of the rows that were chosen.
    StoreAll   GAST in one pass that keeps every row's gradient for every matrix until backward has ended.
    Greats     GREATS: one choice for the whole model, then training on the chosen rows alone. Wang, Wu, Song, Mittal,
               Jia, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration", NeurIPS 2024.

TwoPass and StoreAll choose what siftune's `GAST` chooses, number for number. Greats, with g_i the gradient of row i's
share of the loss for all adapter parameters, h that of the support rows, η the learning rate and S the rows chosen so
far, takes K times the row with the highest

    ⟨h, g_i⟩ − η (B/K) Σ_{j ∈ S} ⟨g_i, g_j⟩

which is what one step of gradient descent on S and i gains on the support rows beyond a step on S, to second order
with the identity for the Hessian, and without the term ⟨g_i, g_i⟩, as the authors' code has it. Ours: the factor B/K,
by which a step on K rows is longer than the sum of their shares; h is one gradient of rows drawn from the training set
in each step, as GAST has it, where the authors take a validation set; one product with it instead of one per row. As
theirs, the choice takes the learning rate as if the optimizer were SGD, and a pass of its own over the B rows.

All three take PEFT's plain LoRA on linear modules in the decoder layers, in one process, and nothing else.

Shapes: B rows, T positions, I inputs, O outputs, K chosen rows, L layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_rows import gradient_of_chosen, lora_matrices, randomness_kept, reading
from siftune.engine import per_sample
from siftune.engine.distributed import world_size
from siftune.errors import RecipeError, UnsupportedError
from siftune.methods.batches import Batch
from siftune.methods.gast import maths
from siftune.methods.gast.scores import Scored, score_samples
from siftune.methods.support import support_gradient
from siftune.methods.layer_driver import Draws, Loss, model_loss

Run = Callable[[Batch], Tensor]  # forward and backward on a batch; returns the loss


@dataclass(frozen=True)
class Choice:
    """The choice in one batch.

    Attributes:
        scores: (L, B), or (1, B) where one choice is made for the model.
        selected: (L, K) int64 row numbers; ascending for GAST, in the order of choice for GREATS.
    """

    scores: Tensor
    selected: Tensor


class Baseline(ABC):
    """What the three have in common. Call `begin()` before every optimizer step, and `step()` for every batch.

    Args:
        model: Causal LM with LoRA, as PEFT attaches it.
        settings: GAST's settings; GREATS looks at `select`, `support_size` and `seed`.
        draws: Support rows, where the settings ask for them.
        loss: Loss of the support rows, a scalar.
        chunk: Rows per forward pass over them.

    Attributes:
        last: The choice in the last batch; None before, and where all rows were followed.

    Raises:
        UnsupportedError: Something trains that is no LoRA matrix of a linear module, or there are several processes.
        RecipeError: The settings ask for what only siftune's own `GAST` does.
    """

    supports: tuple[str, ...] = ("rest", "sample")

    def __init__(
        self,
        model: nn.Module,
        settings: maths.GASTSettings,
        draws: Draws | None = None,
        loss: Loss = model_loss,
        chunk: int = 16,
    ) -> None:
        _refuse_settings(type(self).__name__, settings, self.supports)
        if world_size() > 1:
            raise UnsupportedError(f"{type(self).__name__} is a reference for one process; {world_size()} are at work")
        self.model, self.settings, self.draws, self.loss, self.chunk = model, settings, draws, loss, chunk
        self.layers = lora_matrices(model)
        self.matrices = [matrix for layer in self.layers for matrix in layer]
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.lr = 0.0
        self.last: Choice | None = None
        self.support: dict[nn.Parameter, Tensor] = {}
        self._seed: int | None = None
        self._batches = 0

    def begin(self, lr: float = 0.0) -> None:
        """Draw the step's numbers and support rows in the order in which GAST draws them.

        Args:
            lr: Learning rate of the coming step; only GREATS looks at it.
        """
        self.lr = lr
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
        count = maths.how_many(self.settings.select, rows)
        uniform_LB = self._uniform(rows)
        self.last = None
        if count == rows and not self.settings.replacement:
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
        """What a matrix's gradients are compared with; None: the other rows."""
        if self.settings.support == "rest":
            return None
        return [self.support.get(matrix.weight, torch.zeros_like(matrix.weight))]

    def _choose(self, scored: Sequence[Scored], count: int, uniform_LB: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Choose for every layer: its rows, and the factor on the sum of their gradients."""
        chosen = []
        for layer, uniform_B in zip(scored, uniform_LB, strict=True):
            uniform_B = uniform_B.to(layer.scores.device)
            rows_K = maths.choose(layer.scores, layer.live, uniform_B, count, self.settings)
            chosen.append((rows_K, maths.factor(layer.live, rows_K, self.settings.scale)))
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
                reduced = (per_sample.sum_of(kept[matrix], rows_K) * factor).to(matrix.weight.dtype)
                before = matrix.weight.grad
                matrix.weight.grad = reduced if before is None else before + reduced
        return loss


class Greats(Baseline):
    """GREATS: one choice for all layers, and training on the chosen rows."""

    supports = ("sample",)

    def _select(self, batch: Batch, run: Run, count: int, uniform_LB: Tensor) -> Tensor:
        products: list[Tensor] = []
        grams: list[Tensor] = []

        def read(matrix: nn.Linear, grad_BTO: Tensor, input_BTI: Tensor) -> None:
            rows_BD = per_sample.linear_weight(grad_BTO, input_BTI).flatten(1)
            support = self._support_of(matrix)
            assert support is not None
            products.append(per_sample.products(rows_BD, support[0]))
            wide_BD = rows_BD.to(products[-1].dtype)
            grams.append(wide_BD @ wide_BD.T)

        with reading(self.matrices, batch["input_ids"], read):
            run(batch)
        scores_B = per_sample.added(products)
        chosen_K = greedy(scores_B, per_sample.added(grams), count, self.lr * len(scores_B) / count)
        self.last = Choice(scores_B[None], chosen_K[None])
        return run(_rows_of(batch, chosen_K))


def greedy(products_B: Tensor, gram_BB: Tensor, count: int, step: float) -> Tensor:
    """Choose rows one after the other, each by its product with the support less its overlap with those before.

    Args:
        products_B: (B,) ⟨h, g_i⟩.
        gram_BB: (B, B) ⟨g_i, g_j⟩.
        count: K ≤ B.
        step: Length of the step that is taken on the sum of the g_i.

    Returns:
        (K,) int64 row numbers in the order of choice.
    """
    gains_B = products_B.clone()
    chosen: list[int] = []
    for _ in range(count):
        best = int(gains_B.argmax())
        chosen.append(best)
        gains_B = gains_B - step * gram_BB[best]
        gains_B[chosen] = -torch.inf
    return torch.tensor(chosen, device=products_B.device)


def _added(parts: Sequence[Scored]) -> Scored:
    """A layer's scores from those of its matrices."""
    return Scored(per_sample.added([p.scores for p in parts]), torch.stack([p.live for p in parts]).any(0))


def _rows_of(batch: Batch, rows_K: Tensor) -> dict[str, Any]:
    count = len(batch["input_ids"])
    return {
        name: value[rows_K.to(value.device)] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
        for name, value in batch.items()
    }


def _refuse_settings(name: str, settings: maths.GASTSettings, supports: Sequence[str]) -> None:
    known = {"support": supports, "choice": ("stochastic", "topk"), "score": ("inner",), "pool": ("layer",)}
    for key, values in known.items():
        if getattr(settings, key) not in values:
            raise RecipeError(
                f"{name} is a reference with {key} {' or '.join(values)}, not {getattr(settings, key)}; "
                "siftune's GAST does the others"
            )
