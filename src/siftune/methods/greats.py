"""GREATS: one choice of rows for all layers, the rows that most help a support set.

Wang, Wu, Song, Mittal, Jia, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration",
NeurIPS 2024. With g_i the gradient of sample i's share of the loss for all adapter parameters, h that of the support
rows, η the learning rate, S the samples chosen so far, K of B to be chosen:

    gain       ⟨h, g_i⟩ − η (B/K) Σ_{j ∈ S} ⟨g_i, g_j⟩
    choice     K times the sample with the highest gain
    gradient   (B/K) · Σ_{i ∈ S} g_i

The gain is the value of a gradient descent step on S and i for the support rows, beyond a step on S. It is to second
order with the identity for the Hessian, and without the term ⟨g_i, g_i⟩, as in the authors' code.

Ours, not the paper's: the factor B/K, so that a step on K samples is as long as a step on all. h is the gradient of
4 rows drawn in each step, from the target if there is one, else from the training set; the authors use a validation
set. As in their code, the choice uses the learning rate as if the optimizer were SGD.

Symbols: B samples, K chosen, D values of a parameter. ⟨h, g_i⟩ `products_B`, ⟨g_i, g_j⟩ `gram_BB`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.base import numerics
from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.numerics import widened
from siftune.base.settings import documented
from siftune.engine.groups import LayerGroup
from siftune.engine.ranks import world_size
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_callback import SampleCallback
from siftune.methods.drivers.sample_choice import Choosing, model_unit
from siftune.methods.drivers.sample_driver import SampleRule, summed
from siftune.methods.drivers.support import Gradients, Support
from siftune.methods.host import deepspeed
from siftune.methods.host.callback import calling_trainer, loss_scale
from siftune.methods.options import GREATSSettings

SUPPORT_SIZE = 4
"""Support rows per step (ours)."""


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

    Example:
        >>> products = torch.tensor([3.0, 2.9, 1.0])
        >>> gram = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])  # sample 1 is like sample 0
        >>> greedy(products, gram, torch.ones(3, dtype=torch.bool), 2, step=2.5)
        tensor([0, 2])
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
    """Chooses the samples that most help the support set, by their gradients for all layers.

    It holds the gradients of all samples for all layers until backward ends.
    """

    at_once = True
    support: Support

    def __init__(self, settings: GREATSSettings, groups: Sequence[LayerGroup]) -> None:
        super().__init__([model_unit(groups)], settings.select)
        self.support = Support(SUPPORT_SIZE)

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose samples by their gradients for all layers, and add these up."""
        parts = [grads for _, grads in layers if grads]
        if not parts:
            return {}
        device, support = next(iter(parts[0].values())).device, self.support.gradients
        products: list[Tensor] = []
        grams: list[Tensor] = []
        for grads in parts:
            wide_BD = widened(numerics.joined([*grads.values()]))
            helped = [(support[p] if p in support else torch.zeros_like(part[0]))[None] for p, part in grads.items()]
            products.append((wide_BD @ numerics.joined(helped)[0].to(wide_BD)).to(device))
            grams.append((wide_BD @ wide_BD.T).to(device))
        products_B, gram_BB = numerics.added(products), numerics.added(grams)
        if self.loss_scale is not None and (factor := self.loss_scale()) != 1:  # of every g_i, but not of h
            products_B, gram_BB = products_B / factor, gram_BB / factor**2
        live_B = gram_BB.diagonal() > 0
        # DDP averages the ranks' gradients, so this rank's step is along its gradients times a share of the rate
        step = self._learning_rate() / world_size() * choosing.samples / choosing.count
        chosen_K = greedy(products_B, gram_BB, live_B, choosing.count, step).sort().values
        choosing.note(self.units[0], products_B, chosen_K)
        scale = live_B.sum() / live_B[chosen_K].sum().clamp_min(1)
        scale = scale + (products_B * 0).sum()  # NaN if a product is not finite
        reduced: Gradients = {}
        for grads in parts:
            reduced |= summed(grads, chosen_K, scale)
        return reduced

    def _learning_rate(self) -> float:
        """The learning rate of the next step; 0 without an optimizer, so that samples count independently."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else 0.0


@documented
@dataclass(eq=False)
class GREATS(SampleCallback, GREATSSettings):
    """GREATS: all layers follow the samples that most help a support set (Wang et al., NeurIPS 2024).

    Choices are per forward pass, as GAST's are. The gradients of all samples for all layers are held until backward
    ends: for adapters on a 7B model, rank 32, 16 rows, 1.8 GB in bfloat16.

    With `attach` in a loop that scales losses for float16, set `selection.rule.loss_scale = scaler.get_scale`.

    Args:
        seed: Seed of GREATS' own generator.
        layers: Path of the decoder layers, if their structure does not identify them.
        support_set: Support rows, such as a few rows of the target task, in the form in which the Trainer's training
            rows reach its collator; None: training rows.
        pairs: Row i and row i + B/2 are one sample, as in TRL's preference trainers; None: decided by the Trainer's
            collator.
        keep: Keep the choices of all batches in `history`.

    Attributes:
        last: The `SampleChoice` in the last batch: `scores` (1, samples), ⟨h, g⟩; `selected` (1, K) int64.
        history: The choices of all batches, if `keep` is set.
        on_select: Callback for each batch's choice, optional.

    Raises:
        RecipeError: A setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[GREATS(select=0.5)])
        >>> output = trainer.train()
    """

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
        """Begin, and find the factor by which the Trainer scales losses."""
        trainer = calling_trainer(self)
        if args.fp16 and deepspeed.is_used(trainer):
            raise UnsupportedError(
                "GREATS does not know the loss scale of DeepSpeed's float16: train in bfloat16, or with GAST"
            )
        super().on_train_begin(args, state, control, **kwargs)
        self._begun.rule.loss_scale = partial(loss_scale, trainer)

    def _check_attach(self, batches: Any, optimizer: Any) -> None:
        super()._check_attach(batches, optimizer)
        if optimizer is None:
            raise RecipeError("GREATS uses the optimizer's learning rate: pass attach(..., optimizer=...)")
