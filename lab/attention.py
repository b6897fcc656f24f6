"""Attention over short rows, forward and backward: torch's fused kernel against the products of `short_rows`.

    OMP_NUM_THREADS=1 python -m lab.attention --lengths 32 128 256 384

Prints milliseconds for one layer of SmolLM2's shape with each, the median of several tries that take turns.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from siftune.models.attention import short_rows

_ROWS, _HEADS, _OWN, _WIDTH = 16, 9, 3, 64


def milliseconds(length: int, dtype: torch.dtype, padded: bool, tries: int) -> dict[str, float]:
    """Time of a layer's attention with each, on random rows; `padded`: with a mask, and rows half as long."""
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = _HEADS // _OWN, True
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(_ROWS, 1, -1, -1).clone()
    seen[: _ROWS // 2, :, :, length // 2 :] = False
    times: dict[str, list[float]] = {"sdpa": [], "short_rows": []}
    for _ in range(tries):
        for name, within in (("sdpa", nullcontext), ("short_rows", short_rows)):
            shapes = [(_ROWS, length, count, _WIDTH) for count in (_HEADS, _OWN, _OWN)]
            tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
            started = time.perf_counter()
            with within():
                attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
                found, _ = attention(layer, query, key, value, seen if padded else None)
                found.backward(torch.ones_like(found))
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(taken), 2) for name, taken in times.items()}


def main(argv: list[str] | None = None) -> None:
    """Print a line of JSON for each length, dtype and mask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 384])
    parser.add_argument("--tries", type=int, default=15)
    options = parser.parse_args(argv)
    for dtype in (torch.bfloat16, torch.float32):
        for padded in (False, True):
            for length in options.lengths:
                about = {"dtype": str(dtype), "padded": padded, "length": length}
                print(json.dumps(about | milliseconds(length, dtype, padded, options.tries)), flush=True)


if __name__ == "__main__":
    main()
