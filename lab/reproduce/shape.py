"""What a protocol's run would take, from the real model's shape alone: no weight is ever made.

The model is built on torch's meta device, where tensors have shapes and no values, and a step of its layers runs there:
operations are counted by torch, and memory by what autograd keeps.

    time      2 · forward, for backward to the inputs costs as much as forward where the weights are frozen;
              at 1/1.8 of what the GPU can do, and times the method's ratio
              whole layers that train add 2 operations for each of their weights and tokens;
              checkpointing adds another forward
    memory    weights + 16 bytes for each parameter that trains (value, gradient, two means of Adam, float32)
              + what autograd keeps of a step + logits at the labels, in float32 and the weights' dtype,
              and times the method's ratio;
              with checkpointing autograd keeps the layers' inputs, and all of one layer
    emulator  the middle's weights, and its operations, by the fraction that is kept

Both are estimates *(ours)*. The 1.8 is what dense LoRA took over the matrix products alone on SmolLM2 on a processor
(docs/measured.md), and ratios between methods are the README's, of the same model and processors: no GPU was at hand.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.models.adapters.attach import attach_adapter
from siftune.models.adapters.full import OpenLayers
from siftune.models.layers import find_layers
from siftune.recipe.schema import Recipe

OVER_FLOOR = 1.9  # of a step's time over that of its matrix products, measured: docs/measured.md
# method -> times dense's time and memory, measured: docs/measured.md
RATIOS = {
    "dense": (1.0, 1.0), "ist": (1.05, 0.88), "rst": (0.91, 0.89), "lisa": (0.98, 0.89), "cut": (0.72, 1.0),
    "gast": (1.36, 1.03), "greats": (1.31, 1.03), "trim": (1.1, 1.05),
    "ist+gast": (1.08, 0.89),
}  # fmt: skip
# name -> operations a second in bfloat16, without sparsity, and bytes of memory, as the maker states them
GPUS: dict[str, tuple[float, float]] = {
    "a100-40gb": (312e12, 40e9), "a100-80gb": (312e12, 80e9), "h100": (989e12, 80e9), "rtx4090": (165e12, 24e9),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What is known of a run.

    Attributes:
        parameters: All of the model's, with the adapter.
        trainable: Those that train.
        steps: Optimizer steps.
        flops: Operations of a dense step.
        memory: Bytes of a dense step.
        middle: Parameters between outer layers that train whole; 0 for another run.
        positions: Tokens of a step.
    """

    parameters: int
    trainable: int
    steps: int
    flops: float
    memory: float
    middle: int = 0
    positions: int = 0

    def emulated(self, keep: float) -> "Shape":
        """The same on a kit that holds a fraction of the middle."""
        gone = round((1 - keep) * self.middle)
        flops, memory = self.flops - 4 * gone * self.positions, self.memory - 2 * gone
        return replace(self, parameters=self.parameters - gone, flops=flops, memory=memory)

    def seconds(self, gpu: str, method: str = "dense") -> float | None:
        """Time of training on a GPU; None where the method's ratio was not measured."""
        ratios = RATIOS.get(method)
        return ratios and self.steps * self.flops / GPUS[gpu][0] * OVER_FLOOR * ratios[0]

    def bytes(self, method: str = "dense") -> float | None:
        """Peak memory; None where the method's ratio was not measured."""
        ratios = RATIOS.get(method)
        return ratios and self.memory * ratios[1]


def shape_of(config: Mapping[str, Any], recipe: Recipe, rows: int) -> Shape:
    """Build a model on the meta device, and run the layers of one step there.

    Args:
        config: Of the real model, for `AutoConfig.for_model`.
        recipe: How it is tuned.
        rows: Training rows.

    Raises:
        InputError: The adapter does not fit the model.
    """
    model: Any = on_meta(config)
    vocabulary, stack = model.config.vocab_size, find_layers(model)
    depth, width = len(stack.layers), model.config.hidden_size
    layers = [sum(p.numel() for p in layer.parameters()) for layer in stack.layers]
    tuned, full = _opened(model, recipe), recipe.adapter == "full"
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    base = sum(p.numel() for p in tuned.parameters() if not p.requires_grad)
    flops, kept = _step(tuned, recipe)
    positions = recipe.batch_size * recipe.max_length
    flops += 2.0 * positions * trainable if full else 0.0
    if recipe.checkpointing:
        flops, kept = 1.5 * flops, kept / depth + 2.0 * positions * width * depth
    head = positions * vocabulary  # at the most: where all tokens are learned
    memory = base * 2 + trainable * 16 + kept + head * (2 + 4)
    steps = recipe.steps or math.ceil(math.ceil(rows / (recipe.batch_size * recipe.accumulate)) * recipe.epochs)
    middle = sum(layers) - trainable if full else 0
    return Shape(
        base + trainable, trainable, steps, flops * recipe.accumulate, memory, middle, positions * recipe.accumulate
    )


def _opened(model: Any, recipe: Recipe) -> Any:
    """The model as training would have it: with an adapter, or with layers that train whole."""
    if recipe.adapter == "full":
        OpenLayers(model, recipe.layers, originals=False)
        return model
    return attach_adapter(
        model, recipe.adapter, recipe.rank, recipe.alpha, recipe.dropout, list(recipe.targets or ()) or None,
        recipe.layers, recipe.init,
    )  # fmt: skip


def on_meta(config: Mapping[str, Any]) -> nn.Module:
    """A model of bfloat16 without values."""
    plain = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **plain), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model


def _step(tuned: Any, recipe: Recipe) -> tuple[float, float]:
    """Operations of a step, and bytes that autograd keeps of its forward pass: each tensor once, weights left out."""
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []
    own = {p.untyped_storage()._cdata for p in tuned.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        held.append(tensor)  # or another tensor might come to lie at the same place
        return tensor

    tuned.train()
    size = (recipe.batch_size, recipe.max_length)
    ids = torch.zeros(size, dtype=torch.long, device="meta")
    # of four dimensions: a mask by token would be looked into, and there is nothing in it
    mask = torch.zeros(size[0], 1, size[1], size[1], dtype=torch.bfloat16, device="meta")
    adapters = use_base_dtype(tuned, group_by_layer(tuned))  # as in training
    with (
        adapters,
        _fused_attention(),
        FlopCounterMode(display=False) as counter,
        saved_tensors_hooks(note, lambda t: t),
    ):
        tuned(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    return 2.0 * counter.get_total_flops(), float(sum(kept.values()))


class _Fused(torch.autograd.Function):
    """Attention that keeps what a GPU's kernel keeps: its inputs and its output, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        keys, values = (part.repeat_interleave(groups, 1) for part in (key, value))
        out = query @ keys.transpose(2, 3) @ values
        ctx.save_for_backward(query, key, value, out)
        return out


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    out: torch.Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Have torch's attention, which on the meta device is a plain one, be as on a GPU, but for its values."""
    plain = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain
