"""Opacus' private steps, and drawn rows without privacy, in siftune's Trainer.

Rows, forward passes, loss and optimizer are siftune's. Only clipping and noise differ, and so do the times.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from siftune.methods.dp.callback import DP
from siftune.methods.host.callback import plain_optimizer
from siftune.models.loss import label_positions, logits_at, next_labels
from siftune.train import run
from siftune.train.build import Built
from siftune.train.trainer import SiftTrainer


class DrawnTrainer(SiftTrainer):
    """Training on rows drawn as in a private run, without clipping and noise."""

    @classmethod
    def take_over(cls, trainer: SiftTrainer) -> "DrawnTrainer":
        """Turn a Trainer that is set up for a private run into this one."""
        trainer.__class__ = cls
        return trainer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward passes of a step's rows, without siftune's clipping and noise."""
        privacy = self.privacy
        privacy.remove()  # its hooks come back with every training
        model.train()
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(privacy.parts(inputs)):
            total += self._backward(model, part, privacy, number)
        self._finish(model, privacy)
        return total / max(1, len(inputs["labels"]))

    def _backward(self, model: nn.Module, part: Mapping[str, Tensor], privacy: DP, number: int) -> Tensor:
        loss = self._losses_of_rows(model, part).sum()
        loss.backward()
        return loss.detach()

    def _finish(self, model: nn.Module, privacy: DP) -> None:
        for parameter in trainable(model):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad /= privacy.mechanism.batch

    def _losses_of_rows(self, model: nn.Module, part: Mapping[str, Tensor]) -> Tensor:
        """Mean token loss of every row; (B,)."""
        labels = part["labels"]
        mask = label_positions(labels)
        with self.compute_loss_context_manager(), logits_at(model, mask):
            logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits[0].float()
        losses = nn.functional.cross_entropy(logits, next_labels(labels), reduction="none")
        sums = losses.new_zeros(len(labels)).index_add(0, mask.nonzero()[:, 0], losses)
        return sums / mask.sum(1)


class OpacusTrainer(DrawnTrainer):
    """Opacus' default: gradients of all rows for all layers are stored, clipped after backward, and noised."""

    hooks_kind: ClassVar[type] = GradSampleHooks
    optimizer_kind: ClassVar[type] = DPOptimizer
    own_hooks: ClassVar[tuple[str, ...]] = ()
    _opacus: Any = None

    def _backward(self, model: nn.Module, part: Mapping[str, Tensor], privacy: DP, number: int) -> Tensor:
        if self._opacus is None:
            self._begin(model, privacy)
        losses = self._losses_of_rows(model, part)
        self._clip(losses, number)
        return losses.detach().sum()

    def _begin(self, model: nn.Module, privacy: DP) -> None:
        numbers = privacy.mechanism
        own = dict.fromkeys(self.own_hooks, numbers.clip)
        self._hooks = self.hooks_kind(model, loss_reduction="sum", strict=False, **own)
        self._opacus = self.optimizer_kind(
            plain_optimizer(self.optimizer), noise_multiplier=numbers.noise, max_grad_norm=numbers.clip,
            expected_batch_size=numbers.batch, loss_reduction="sum",
        )  # fmt: skip

    def _clip(self, losses: Tensor, number: int) -> None:
        losses.sum().backward()
        self._opacus.clip_and_accumulate()
        for parameter in self._opacus.params:
            parameter.grad_sample = None

    def _finish(self, model: nn.Module, privacy: DP) -> None:
        if self._opacus is None:
            self._begin(model, privacy)
        for parameter in self._opacus.params:
            if parameter.summed_grad is None:  # no row was drawn
                parameter.summed_grad = torch.zeros_like(parameter)
        self._opacus.add_noise()
        for parameter in self._opacus.params:
            parameter.grad /= privacy.mechanism.batch
            parameter.summed_grad = None


class GhostTrainer(OpacusTrainer):
    """Opacus' ghost clipping: one backward pass for the rows' norms, and one with the rows' losses weighted by them."""

    hooks_kind = GradSampleHooksFastGradientClipping
    optimizer_kind = DPOptimizerFastGradientClipping
    own_hooks: ClassVar[tuple[str, ...]] = ("max_grad_norm",)

    def _clip(self, losses: Tensor, number: int) -> None:
        self._opacus._is_last_step_skipped = number > 0  # else it forgets the parts before
        DPTensorFastGradientClipping(self._hooks, self._opacus, losses, "sum").backward()
        self._opacus.accumulate()
        self._opacus.original_optimizer.zero_grad()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


TRAINERS = {"dense-drawn": DrawnTrainer, "opacus": OpacusTrainer, "opacus-ghost": GhostTrainer}


@contextmanager
def in_place(name: str) -> Iterator[None]:
    """Have the private runs of siftune's training path take the steps of one of TRAINERS."""
    build = run.build

    def build_and_replace(*values: Any, **named: Any) -> Built:
        result = build(*values, **named)
        TRAINERS[name].take_over(result.trainer)
        return result

    with patch.object(run, "build", build_and_replace):
        yield
