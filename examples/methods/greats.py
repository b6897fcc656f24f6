"""GREATS: one choice of rows for all layers, the rows that most help a support set. A method outside the package.

    trainer = Trainer(model, args, train_dataset=rows, callbacks=[GREATS(select=0.5)])

Wang, Wu, Song, Mittal, Jia, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration",
NeurIPS 2024. With g_i the gradient of sample i's share of the loss for all adapter parameters, h that of the support
rows, η the learning rate, S the samples chosen so far, K of B to be chosen:

    gain       ⟨h, g_i⟩ − η (B/K) Σ_{j ∈ S} ⟨g_i, g_j⟩
    choice     K times the sample with the highest gain
    gradient   (B/K) · Σ_{i ∈ S} g_i

The gain is the value of a gradient descent step on S and i for the support rows, beyond a step on S. It is to second
order with the identity for the Hessian, and without the term ⟨g_i, g_i⟩, as in the authors' code.

Ours, not the paper's: the factor B/K, so that a step on K samples is as long as a step on all. h is the gradient of
4 rows drawn in each step, from `support_set` if there is one, else from the training set; the authors use a validation
set. As in their code, the choice uses the learning rate as if the optimizer were SGD.

Symbols: B samples, K chosen, D values of a parameter. ⟨h, g_i⟩ `products_B`, ⟨g_i, g_j⟩ `gram_BB`. The gradients of
all samples for all layers are held until backward ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.base import numerics
from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.ranks import world_size
from siftune.base.settings import CONFIG, CountOrShare, Settings
from siftune.engine.groups import LayerGroup
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_callback import SampleCallback
from siftune.methods.drivers.sample_choice import Choosing, model_unit
from siftune.methods.drivers.sample_driver import SampleRule, SampleSelection, summed
from siftune.methods.drivers.support import Gradients, Support

SUPPORT_SIZE = 4
"""Support rows per step (ours)."""


@checked(config=CONFIG)
class GREATSSettings(Settings):
    """Options, whose ranges are checked."""

    group = "greats"

    select: CountOrShare = 0.5
    """Rows of a batch that are followed: a number of rows, or a share such as 0.5."""


def greedy(products_B: Tensor, gram_BB: Tensor, live_B: Tensor, count: int, step: float) -> Tensor:
    """Choose samples one by one, each by its product with the support minus its overlap with the earlier choices.

    Args:
        products_B: (B,) ⟨h, g_i⟩.
        gram_BB: (B, B) ⟨g_i, g_j⟩.
        live_B: (B,) bool, samples with a gradient; others are chosen only if there are too few.
        count: K ≤ B.
        step: η (B/K), the length of the step along the sum of the g_i.

    Returns:
        (K,) int64 sample numbers in the order of choice.
    """
    gains_B = products_B.where(live_B, -torch.finfo(products_B.dtype).max)
    chosen: list[Tensor] = []
    for _ in range(count):
        best = gains_B.argmax()
        chosen.append(best)
        gains_B = (gains_B - step * gram_BB.index_select(0, best[None])[0]).index_fill(
            0, torch.stack(chosen), -torch.inf
        )
    return torch.stack(chosen)


class HelpfulSamples(SampleRule):
    """Chooses the samples that most help the support set, by their gradients for all layers."""

    at_once = True
    support: Support

    def __init__(self, method: "GREATS", groups: Sequence[LayerGroup]) -> None:
        super().__init__([model_unit(groups)], method.select)
        self.support = Support(SUPPORT_SIZE)
        self._method = method

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose samples by their gradients for all layers, and add these up."""
        parts = [grads for _, grads in layers if grads]
        if not parts:
            return {}
        device, support = next(iter(parts[0].values())).device, self.support.gradients
        products: list[Tensor] = []
        grams: list[Tensor] = []
        for grads in parts:
            wide_BD = numerics.widened(numerics.joined([*grads.values()]))
            helped = [(support[p] if p in support else torch.zeros_like(part[0]))[None] for p, part in grads.items()]
            products.append((wide_BD @ numerics.joined(helped)[0].to(wide_BD)).to(device))
            grams.append((wide_BD @ wide_BD.T).to(device))
        products_B, gram_BB = numerics.added(products), numerics.added(grams)
        live_B = gram_BB.diagonal() > 0
        # DDP averages the ranks' gradients, so this rank's step is along its gradients times a share of the rate
        rate = float(self._method.optimizer.param_groups[0]["lr"]) / world_size()
        step = rate * choosing.samples / choosing.count
        chosen_K = greedy(products_B, gram_BB, live_B, choosing.count, step).sort().values
        choosing.note(self.units[0], products_B, chosen_K)
        scale = live_B.sum() / live_B[chosen_K].sum().clamp_min(1)
        scale = scale + (products_B * 0).sum()  # NaN if a product is not finite
        reduced: Gradients = {}
        for grads in parts:
            reduced |= summed(grads, chosen_K, scale)
        return reduced


@dataclass(eq=False)
class GREATS(SampleCallback, GREATSSettings):
    """All layers follow the samples that most help a support set.

    Args:
        select: Rows of a batch that are followed: a number of rows, or a share such as 0.5.
        seed: Seed of the method's own generator.
        layers: Path of the decoder layers, if their structure does not identify them.
        support_set: Support rows, in the form in which the Trainer's training rows reach its collator; None: training
            rows.
        pairs: Row i and row i + B/2 are one sample; None: decided by the Trainer's collator.
        keep: Keep the choices of all batches in `history`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer: Any = None  # of the training, for its learning rate

    def rule(self, groups: Sequence[LayerGroup]) -> HelpfulSamples:
        """Samples by their value for the support set."""
        return HelpfulSamples(self, groups)

    @property
    def support_source(self) -> str | None:
        """The support set if there is one, else the training set."""
        return "sample" if self.support_set is None else "dataset"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the Trainer's optimizer."""
        if args.fp16:
            raise UnsupportedError("GREATS compares gradients of unscaled losses: train in bfloat16 instead of float16")
        self.optimizer = kwargs["optimizer"]
        super().on_train_begin(args, state, control, **kwargs)

    def attach(
        self, model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, **others: Any
    ) -> SampleSelection:
        """Select samples in a plain loop; see `SampleCallback.attach`. The optimizer is required."""
        if optimizer is None:
            raise RecipeError("GREATS uses the optimizer's learning rate: pass attach(..., optimizer=...)")
        self.optimizer = optimizer
        return super().attach(model, optimizer=optimizer, **others)
