"""Rivals of the divergence: cross entropy, elastic weight consolidation, a Fisher gate of layers, orthogonal adapters.

Elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796) penalises ½ Σ F (W − W₀)² with the diagonal Fisher F
of the base. Our form: F is that of the adapted matrices W, from the texts' gradients, and W − W₀ is LoRA's product, so
that the penalty is second order in B and zero at the start. F is per token, so that a weight of 1 has the divergence's
unit: on the base's own texts ½ Σ F (W − W₀)² is its second order without the pairs of different values.

The gate ranks layers once, before training, by ‖g‖² / (gᵀ F g), with the gradient g of the task and F the mean over the
texts of their gradients' outer products. Our form: gradients of LoRA's parameters at their start, where those of A are
zero; the half of the layers with the highest ratios trains.

Shapes: L layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from peft import OFTConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from siftune.data.batches import Collator
from siftune.engine.groups import group_by_layer
from siftune.methods.keep.callback import Penalty
from siftune.models.adapters.configs import lora
from siftune.models.adapters.registry import ADAPTER_TYPES, Shape
from siftune.models.loss import cross_entropy, label_positions, next_labels

Rows = Sequence[Mapping[str, Any]]


class OwnRows(Penalty):
    """Cross entropy on the texts, instead of the divergence."""

    def __call__(self, number: int) -> Tensor:
        """The mean loss of a group."""
        return self._losses(number).mean()

    def gradients(self, parameters: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """For each group, the gradients of its summed loss."""
        for number in range(len(self._batches)):
            with torch.enable_grad():
                yield torch.autograd.grad(self._losses(number).sum(), parameters)

    def _losses(self, number: int) -> Tensor:
        batch = self._batches[number]
        return cross_entropy(self._logits(batch), next_labels(batch["labels"]))


class Elastic(OwnRows):
    """½ Σ F ΔW², with the Fisher of the texts per token; the model must be the base when it is made."""

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *args: Any) -> None:
        super().__init__(model, batches, *args)
        self._adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
        weights = [module.get_base_layer().weight for module in self._adapted]
        self._fisher = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        tokens = sum(int(label_positions(batch["labels"]).sum()) for batch in batches)
        try:
            for weight in weights:
                weight.requires_grad_(True)
            for gradients in self.gradients(weights):
                for fisher, gradient in zip(self._fisher, gradients, strict=True):
                    fisher.addcmul_(gradient.float(), gradient.float(), value=1 / tokens)
        finally:
            for weight in weights:
                weight.requires_grad_(False)

    def __call__(self, number: int) -> Tensor:
        """The penalty, the same for all groups."""
        parts = zip(self._fisher, self._adapted, strict=True)
        return torch.stack([(F * m.get_delta_weight("default").float().square()).sum() / 2 for F, m in parts]).sum()


def fisher_ratios(model: nn.Module, task: Rows, texts: Rows) -> Tensor:
    """‖g‖² / (gᵀ F g) of each layer; (L,) float32.

    Args:
        model: The base with LoRA at its start.
        task: Tokenised training rows, whose summed loss has the gradient g; its scale does not count.
        texts: Tokenised texts of the base.
    """
    groups = group_by_layer(model)
    layer_of = torch.tensor([number for number, group in enumerate(groups) for _ in group.parameters])
    parameters = [p for group in groups for p in group.parameters.values()]

    def by_layer(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        products = torch.stack([(a.float() * b.float()).sum() for a, b in zip(one, other, strict=True)])
        return torch.zeros(len(groups)).index_add(0, layer_of, products)

    def gradients(rows: Rows) -> Iterator[Sequence[Tensor]]:
        return OwnRows(model, [Collator(0)([dict(row)]) for row in rows]).gradients(parameters)

    total = [torch.zeros_like(parameter) for parameter in parameters]
    for of_row in gradients(task):
        torch._foreach_add_(total, list(of_row))
    curvature_L = torch.stack([by_layer(of_text, total).square() for of_text in gradients(texts)]).mean(0)
    return by_layer(total, total) / curvature_L


def train_best_half(model: nn.Module, ratios_L: Tensor) -> list[int]:
    """Freeze all layers but the half with the highest ratios; return the numbers of those that train."""
    groups = group_by_layer(model)
    best = ratios_L.topk(max(1, len(groups) // 2)).indices.tolist()
    for place in {*range(len(groups))} - {*best}:
        for parameter in groups[place].parameters.values():
            parameter.requires_grad_(False)
    return sorted(groups[place].index for place in best)


def orthogonal(model: nn.Module, shape: Shape) -> OFTConfig:
    """Config of OFT (arXiv 2306.07280) with PEFT's own settings, on the modules of LoRA."""
    usual = lora(model, shape)
    return OFTConfig(task_type="CAUSAL_LM", target_modules=usual.target_modules, fan_in_fan_out=usual.fan_in_fan_out)


def orthogonal_adapters() -> AbstractContextManager[Any]:
    """Within the block, adapter `lora` is OFT."""
    return patch.dict(ADAPTER_TYPES, lora=replace(ADAPTER_TYPES["lora"], config=f"{__name__}:orthogonal"))
