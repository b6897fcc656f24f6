"""Cost of the row record: its share of a step's time, and bytes per row and epoch.

    python -m lab.rows.price                                        # SmolLM2, 16 rows of 128 tokens, 32 learned
    python -m lab.rows.price --model tiny --length 32 --steps 20    # a trial
    python -m lab.rows.price --bytes                                # the file of 100,000 rows alone

`RowRecord` leaves training bit-identical. Its cost is the time of this thread in its events, its forward hook and the
numbering of batches, writing the file included, over the time of the training steps. `own` is siftune's Trainer, whose
loss returns the losses of rows; `any` is transformers' Trainer, where they are computed from the logits.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from lab.random_llama import save_llama
from siftune.base.environment import hardware
from siftune.methods.host.row_numbers import NumberingCollator
from siftune.models.adapters.attach import attach_adapter
from siftune.models.load import load_model
from siftune.records.record import RowRecord
from siftune.records.visits import Visits, write_visits
from siftune.train.trainer import SiftTrainer

_EVENTS = ("on_train_begin", "on_epoch_begin", "on_substep_end", "on_pre_optimizer_step", "on_train_end")


class Clock(TrainerCallback):  # type: ignore[misc]
    """Time of this thread in steps, and in the timed functions."""

    def __init__(self) -> None:
        self.inside = 0.0
        self.steps: list[float] = []
        self._since = 0.0

    def timed(self, call: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """The same function, whose time is added, or with sign -1 subtracted."""

        @wraps(call)
        def run(*values: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*values, **named)
            finally:
                self.inside += sign * (time.thread_time() - started)

        return run

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._since = time.thread_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.steps.append(time.thread_time() - self._since)


def rows_of(count: int, length: int, learned: int, vocabulary: int) -> Dataset:
    """Random rows of exactly `length` tokens, of which the last ones are learned."""
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length - learned] = -100
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Dataset.from_dict({name: values.tolist() for name, values in columns.items()})


def share(kind: type[Trainer], args: argparse.Namespace, folder: Path) -> float:
    """Train some steps; the record's share of their time."""
    model, _ = load_model(save_llama(folder / "model", 2, 64, args.length) if args.model == "tiny" else args.model)
    model = attach_adapter(model, rank=32)
    settings = TrainingArguments(
        str(folder), max_steps=args.steps, per_device_train_batch_size=args.batch, report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    data = rows_of(args.steps * args.batch, args.length, args.learned, model.config.vocab_size)
    clock, record = Clock(), RowRecord()
    for name in _EVENTS:
        setattr(record, name, clock.timed(getattr(record, name)))
    register = model.register_forward_hook
    collate = clock.timed(default_data_collator, -1)  # within NumberingCollator
    trainer = kind(model, settings, collate, train_dataset=data, callbacks=[record, clock])
    trainer.remove_callback(PrinterCallback)

    def registered(hook: Callable[..., Any], *values: Any, **named: Any) -> Any:
        own = getattr(hook, "__self__", None) is record
        return register(clock.timed(hook) if own else hook, *values, **named)

    with (
        patch.object(model, "register_forward_hook", registered),
        patch.object(NumberingCollator, "__call__", clock.timed(NumberingCollator.__call__)),
    ):
        trainer.train()
    return clock.inside / sum(clock.steps)


def file_bytes(rows: int) -> float:
    """Bytes of the file for each row of one epoch, places among them."""
    rng = np.random.default_rng(0)
    columns = [rng.permutation(rows), np.arange(rows) // 16, rng.gamma(2, 1, rows), rng.integers(1, 200, rows)]
    places = [f"/home/somebody/data/instructions/rows.jsonl:{row + 1}" for row in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_visits(path, Visits.of(np.stack(columns)), places, "0" * 64)
        return path.stat().st_size / rows


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, a folder, or tiny: a random llama")
    add("--batch", type=int, default=16)
    add("--length", type=int, default=128)
    add("--learned", type=int, default=None, help="label tokens of a row; a quarter of all if not given")
    add("--steps", type=int, default=5)
    add("--bytes", action="store_true", help="leave time out")
    args = parser.parse_args(argv)
    args.learned = args.learned or args.length // 4
    print(f"bytes a row and epoch, 100,000 rows: {file_bytes(100_000):.1f}")
    for name, kind in () if args.bytes else (("own", SiftTrainer), ("any", Trainer)):
        with tempfile.TemporaryDirectory() as folder:
            found = share(kind, args, Path(folder))
        print(f"time of a step, {name}: {100 * found:.3f} % ({args.model}, {args.batch} × {args.length}, {hardware()})")


if __name__ == "__main__":
    main()
