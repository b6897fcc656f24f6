"""The matmul floor: the time of a dense step's matrix products at this machine's highest measured rate.

    OMP_NUM_THREADS=2 python -m lab.floor --batch-size 16 --length 128

torch counts the operations of one dense step. The rate is the highest of products in the model's dtype. No dense step
can be faster without leaving products out.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from siftune.base.environment import hardware
from siftune.bench.cost import Workload
from siftune.bench.worker import build_trainer
from siftune.models.source import resolve

_SQUARE = 2048  # side of the square product that the rate is measured with, beside the model's own shapes


class StepFlops(TrainerCallback):  # type: ignore[misc]
    """Counts the floating-point operations of the matrix products in one step.

    Args:
        step: Steps done before it; not 0, because the first compares losses besides training.
    """

    def __init__(self, step: int = 1) -> None:
        self._step = step
        self._counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        self._counting = ExitStack()
        self.total = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start counting."""
        if state.global_step == self._step:
            self._counting.enter_context(self._counter)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop counting."""
        if state.global_step == self._step + 1:
            self._counting.close()
            self.total = self._counter.get_total_flops()


def floor(work: Workload, folder: Path) -> dict[str, float]:
    """Count a dense step's products and measure how fast this machine multiplies."""
    counter = StepFlops()
    trainer = build_trainer("dense", work, folder, counter)
    trainer.args.max_steps = 2
    trainer.train()
    config = trainer.model.config.get_text_config()
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    shapes = [(_SQUARE,) * 3, (work.batch_size * work.length, width, inner)]
    parameter = next(trainer.model.parameters())
    rate = max(product_rate(*shape, parameter.dtype, parameter.device) for shape in shapes)
    return {"flops": counter.total, "flops_per_second": rate, "seconds": counter.total / rate}


def product_rate(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device, least: float = 0.5
) -> float:
    """Floating-point operations per second of (rows, inner) @ (inner, columns): the fastest of many, over `least` s."""
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(rows, inner, generator=generator, device=device).to(dtype)
    right = torch.randn(inner, columns, generator=generator, device=device).to(dtype)
    times = [_timed(lambda: left @ right) for _ in range(3)]
    while sum(times) < least:
        times.append(_timed(lambda: left @ right))
    return 2 * rows * inner * columns / min(times)


def _timed(work: Callable[[], Any]) -> float:
    _synchronize()
    started = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _attention_flops(query: torch.Size, key: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products per head: of queries with keys, and of the weights with the values."""
    rows, heads, length, width = query
    return 4 * rows * heads * length * key[2] * width


def _attention_backward_flops(grad: Any, query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Five products of the same size: the weights are computed again, then four gradients."""
    return _attention_flops(query, key) * 5 // 2


# torch's counter knows the GPU's fused attention, not the CPU's
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def main(argv: list[str] | None = None) -> int:
    """Print the floor as a line of JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args(argv)
    work = Workload(str(resolve(args.model)), batch_size=args.batch_size, length=args.length, steps=2, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({**floor(work, Path(folder)), "hardware": hardware()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
