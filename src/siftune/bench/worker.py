"""Measure one method in this process, which `cost` starts for nothing else.

Call: `python -m siftune.bench.worker FOLDER`. It reads FOLDER/job.json and writes FOLDER/result.json.

siftune's methods are assembled by siftune's own training path, as in a user's run but without its records and its
progress bar; the rows are made up. TRL's yardstick gets the same rows, batches, weights and adapter; everything else is
TRL's default.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from siftune.base.environment import hardware, peak_memory_mb, versions
from siftune.base.errors import RecipeError, SiftuneError
from siftune.bench.workload import Workload
from siftune.models.load import load_model
from siftune.train.build import build


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimizer step ended.

    From one end to the next lies all that a step costs: its batch, the selection, which scores when the step begins,
    forward, backward, update, and the logs of the step before.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Wait for the device and note the time, in seconds."""
        _synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self, warmup: int) -> list[float]:
        """Time of each step after the first `warmup`, at least one."""
        ends = self.ends[warmup - 1 :]
        return [after - before for before, after in pairwise(ends)]


def work_off(task: str, work: Workload, folder: Path, build: Callable[..., Trainer] | None = None) -> dict[str, Any]:
    """Measure the method `task`. See `main` for `build`.

    Returns:
        `seconds` of each timed step, `peak_memory_mb`, `dtype`, `hardware` and `versions`.
    """
    clock = Clock()
    trainer = (build or build_trainer)(task, work, folder, clock)
    trainer.train()
    costs = {"seconds": clock.seconds(work.warmup), "peak_memory_mb": peak_memory_mb()}
    dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")  # of the frozen weights
    trl = {"trl": version("trl")} if task.startswith("trl") else {}
    return {**costs, "dtype": dtype, "hardware": hardware(), "versions": {**versions(), **trl}}


def build_trainer(method: str, work: Workload, folder: Path, *watchers: TrainerCallback) -> Trainer:
    """Assemble the Trainer of a method, with `watchers` as its last callbacks.

    Raises:
        InputError: The model cannot be loaded, cannot take rows of this length, or has no such targets.
    """
    model, tokenizer = load_model(work.model, work.dtype)
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and work.length > longest:
        raise RecipeError(f"length is {work.length}, but {work.model} takes at most {longest} tokens")
    rows = random_rows(work, config.vocab_size)
    assemble = _trl_trainer if method.startswith("trl") else _siftune_trainer
    trainer = assemble(method, work, folder, model, tokenizer, rows)
    for watcher in watchers:
        trainer.add_callback(watcher)
    return trainer


def random_rows(work: Workload, vocabulary: int) -> Dataset:
    """Make up as many rows as the steps take.

    Returns:
        Columns as of `tokenize_rows`: `input_ids`, `labels` (-100 but on the last part of the row) and `length`.
    """
    count = work.batch_size * (work.warmup + work.steps)
    generator = torch.Generator().manual_seed(work.seed)
    ids = torch.randint(vocabulary, (count, work.length), generator=generator)
    labels = ids.clone()
    labels[:, : work.length - work.labels()] = -100
    columns = {"input_ids": ids.tolist(), "labels": labels.tolist(), "length": [work.length] * count}
    numbers = List(Value("int32"))
    return Dataset.from_dict(
        columns, features=Features({"input_ids": numbers, "labels": numbers, "length": Value("int32")})
    )


def _siftune_trainer(
    method: str, work: Workload, folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> Trainer:
    """Assemble what `siftune train` would."""
    recipe = work.recipe(method, str(folder / "run"))
    return build(recipe, model, tokenizer, {"train": rows}, folder / "run").trainer


def _trl_trainer(
    method: str, work: Workload, folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> Trainer:
    """Assemble TRL's own: only what defines the workload is set, and that nothing is saved or sent."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = {"gradient_checkpointing": False} if method == "trl-no-checkpointing" else {}
    arguments = SFTConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=work.batch_size,
        max_steps=work.warmup + work.steps,
        max_length=work.length,
        seed=work.seed,
        use_cpu=not torch.cuda.is_available(),  # without it TRL's default of bf16 is refused on a CPU
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=work.rank, lora_alpha=2 * work.rank, target_modules=list(work.targets))
    return SFTTrainer(
        model,
        args=arguments,
        train_dataset=rows.remove_columns("length"),
        processing_class=tokenizer,
        peft_config=lora,
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: list[str], build: Callable[..., Trainer] = build_trainer) -> int:
    """Work off the job in the folder that the only argument names; return the exit code.

    Args:
        argv: The folder.
        build: Assembles the Trainer of a method, as `build_trainer` does; other benchmarks bring methods of their own.
    """
    folder = Path(argv[0])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    work = Workload(**{**job["workload"], "targets": tuple(job["workload"]["targets"])})
    try:
        result = work_off(job["task"], work, folder, build)
    except SiftuneError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
