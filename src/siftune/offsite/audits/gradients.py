"""Similarity of the outer layers' gradients on the base model and on the emulator.

Outer layers that are tuned on the emulator follow the emulator's gradients. How far they point where the base's would
is their cosine, over each outer layer and over all of them together:

    cos = ⟨g_base, g_emulator⟩ / (‖g_base‖ ‖g_emulator‖),   g = ∂/∂θ Σ_rows Σ_labels −ln p(x_t | x_<t)

All labels have the same weight, and the cosine does not depend on whether the loss is summed or averaged.

Shapes: B rows, T positions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siftune.base.numerics import in_float64
from siftune.models.layers import find_layers
from siftune.models.loss import label_positions, logits_at, token_loss
from siftune.models.modules import evaluating, model_device, trainable_only
from siftune.offsite.emulator.model import Split, outer_names

Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class OuterGradient:
    """The gradient of the summed loss for the outer layers' parameters."""

    tensors: Mapping[str, Tensor]  # neutral name (see `emulator.model.outer_names`) -> gradient in float32
    loss: float  # mean loss per label token, in nats
    tokens: int  # label tokens


@dataclass(frozen=True)
class GradientCosine:
    """Cosines between the outer layers' gradients on two models; NaN where one of the two is zero."""

    layers: list[str]  # neutral names of the outer layers, from the embeddings to the head
    per_layer: list[float]  # cosine in each of them
    overall: float  # cosine over all of them side by side
    loss_full: float  # loss of the base model per label token, in nats
    loss_emulator: float  # the same of the emulator


def gradient_cosine(model: nn.Module, emulator: nn.Module, batches: Batches, split: Split) -> GradientCosine:
    """Compare the outer layers' gradients on a base model and on an emulator of it; arguments as for `outer_gradient`.

    Raises:
        ValueError: The two have other outer layers, or no batch has a label.
    """
    batches = list(batches)  # an iterator could not be read twice
    return cosine(outer_gradient(model, batches, split), outer_gradient(emulator, batches, split))


def outer_gradient(model: nn.Module, batches: Batches, split: Split) -> OuterGradient:
    """Compute the outer layers' gradient, batch after batch.

    Dropout is off. Afterwards the model's modes, `requires_grad` and `grad` are as they were.

    Args:
        model: A base model or an emulator, without PEFT around it; logits are computed at label positions only.
        batches: (B, T) `input_ids`, `attention_mask` and `labels` (-100 where nothing is learned).
        split: Its split.

    Raises:
        ValueError: No batch has a label.
        LayerError: The split does not fit the model.
    """
    parameters = outer_parameters(model, split)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    loss, tokens = 0.0, 0
    with evaluating(model), trainable_only(model, parameters.values()), torch.enable_grad():
        for batch in batches:
            count = int(label_positions(batch["labels"]).sum())
            if not count:
                continue
            summed = _summed_loss(model, batch)
            grads = torch.autograd.grad(summed, list(parameters.values()), allow_unused=True)
            for total, grad in zip(sums.values(), grads, strict=True):
                if grad is not None:
                    total += grad
            loss, tokens = loss + float(summed.detach()), tokens + count
    if not tokens:
        raise ValueError("no batch has a label, so there is no gradient; give rows with a completion")
    return OuterGradient(sums, loss / tokens, tokens)


def cosine(full: OuterGradient, emulator: OuterGradient) -> GradientCosine:
    """Compare two gradients that were computed before.

    Raises:
        ValueError: They are not of the same parameters.
    """
    shapes = [{name: tensor.shape for name, tensor in one.tensors.items()} for one in (full, emulator)]
    if shapes[0] != shapes[1]:
        raise ValueError("the gradients are of different layers; give a model and an emulator of it, with one split")
    products: dict[str, Tensor] = {}  # layer -> ⟨a, b⟩, ⟨a, a⟩, ⟨b, b⟩
    for name, a in full.tensors.items():
        b = emulator.tensors[name].to(a.device)
        layer = ".".join(name.split(".")[:2])
        products[layer] = products.get(layer, torch.zeros(3, dtype=torch.float64)) + _products(a, b)
    return GradientCosine(
        layers=list(products),
        per_layer=[_ratio(three) for three in products.values()],
        overall=_ratio(torch.stack(list(products.values())).sum(0)),
        loss_full=full.loss,
        loss_emulator=emulator.loss,
    )


def outer_parameters(model: nn.Module, split: Split) -> dict[str, nn.Parameter]:
    """The outer layers' parameters by neutral name; buffers are left out.

    Raises:
        LayerError: The split does not fit the model.
    """
    split.middle(len(find_layers(model).layers))  # refuses a split that leaves no middle
    by_name = dict(model.named_parameters())
    return {neutral: by_name[name] for neutral, name in outer_names(model, split).items() if name in by_name}


def _summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy in float32, summed over label positions."""
    inputs = {name: batch[name].to(model_device(model)) for name in ("input_ids", "attention_mask", "labels")}
    labels = inputs.pop("labels")
    with logits_at(model, label_positions(labels)):
        logits = model(**inputs, use_cache=False).logits
    return token_loss(logits, labels, items=1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩, ⟨a, a⟩ and ⟨b, b⟩ in float64, on the CPU."""
    flat_a, flat_b = in_float64(a).flatten(), in_float64(b).flatten()
    return torch.stack([flat_a @ flat_b, flat_a @ flat_a, flat_b @ flat_b]).cpu()


def _ratio(three: Tensor) -> float:
    inner, a, b = three.tolist()
    norms = float(a**0.5 * b**0.5)
    return float(inner / norms) if norms > 0 else float("nan")
