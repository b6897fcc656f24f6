"""What compiling a layer's parts saves: forward and backward of a few layers, as ever and compiled, in turn.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py --layers 2 --rounds 7 --attention sdpa

SmolLM2 with LoRA, 16 rows of 128 tokens, in one process, so that what else the machine does meets both alike; ratios of
processor time and of wall time within a round, their medians and ranges. `siftune bench --methods dense,dense-compiled`
has whole steps, and memory.
"""

import argparse
import copy
import time
from statistics import median

import torch
from torch import Tensor, nn

from siftune.engine.compiled import CompiledParts
from siftune.engine.groups import LayerGroup
from siftune.engine.substitution import use_base_dtype
from siftune.models.adapters import attach_adapter
from siftune.models.layers import find_layers
from siftune.models.source import load_model

ROWS, TOKENS = 16, 128


class Stack(nn.Module):
    """Copies of a Llama's layers, with casts on their adapters as in training."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(find_layers(model).layers[:count]))

    def cast(self) -> None:
        """Have float32 adapters compute in the base's dtype."""
        groups = [
            LayerGroup(number, str(number), layer, {n: p for n, p in layer.named_parameters() if p.requires_grad})
            for number, layer in enumerate(self.layers)
        ]
        use_base_dtype(self, groups)

    def forward(self, hidden: Tensor, **given: Tensor) -> Tensor:
        """Hidden states (B, T, H) through the layers."""
        for layer in self.layers:
            hidden = layer(hidden, **given)
        return hidden


def timed(stack: Stack, hidden: Tensor, given: dict[str, Tensor]) -> tuple[float, float]:
    """Seconds of the processor and of the clock for a pass there and back."""
    entering = hidden.clone().requires_grad_()
    processor, clock = time.process_time(), time.perf_counter()
    stack(entering, **given).square().mean().backward()
    return time.process_time() - processor, time.perf_counter() - clock


def told(ratios: list[float]) -> str:
    """Median and range."""
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args()
    model, _ = load_model("smollm2")
    model.set_attn_implementation(options.attention)
    attach_adapter(model, "lora", rank=32, targets=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"))
    hidden = torch.randn(ROWS, TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(model.dtype)
    causal = torch.full((TOKENS, TOKENS), float("-inf"), dtype=model.dtype).triu(1)[None, None]
    rotary = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = {
        "position_embeddings": rotary.model.rotary_emb(hidden, torch.arange(TOKENS)[None]),
        "attention_mask": None if options.attention == "sdpa" else causal,
    }
    eager, compiled = Stack(model, options.layers), Stack(model, options.layers)
    parts = CompiledParts(compiled.layers)
    for stack in (eager, compiled):
        stack.cast()
        timed(stack, hidden, given)
    print(f"{parts.graphs} compilations, {parts.seconds:.0f} s")
    rounds = []
    for number in range(options.rounds):
        order = (eager, compiled) if number % 2 == 0 else (compiled, eager)
        seconds = {stack: timed(stack, hidden, given) for stack in order}
        rounds.append([c / e for c, e in zip(seconds[compiled], seconds[eager], strict=True)])
    processor, clock = (list(column) for column in zip(*rounds, strict=True))
    print(f"processor time {told(processor)}, wall time {told(clock)} of that without")


if __name__ == "__main__":
    main()
