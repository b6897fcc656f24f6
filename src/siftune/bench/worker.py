"""Measure one method in this process, which `cost` starts only for it.

Call: `python -m siftune.bench.worker FOLDER`. It reads FOLDER/job.json and writes FOLDER/result.json.

siftune's methods run on siftune's own training path, without its records and its progress bar, on random tokens. TRL's
trainer gets the same rows, batches, weights and adapter; everything else is TRL's default.
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

from siftune.base.environment import hardware, peak_memory_mb, reset_peak_memory, synchronize, versions
from siftune.base.errors import RecipeError, SiftuneError
from siftune.bench.cost import Workload
from siftune.models.load import load_model
from siftune.train.build import build


class Clock(TrainerCallback):  # type: ignore[misc]
    """Records the end of each optimizer step.

    The time between two ends holds everything that a step costs: its batch, the selection with its scoring, forward,
    backward, update, and the logs of the previous step.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Wait for the device and record the time, in seconds."""
        synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self, warmup: int) -> list[float]:
        """Time of each step after the first `warmup`, at least one."""
        return [after - before for before, after in pairwise(self.ends[warmup - 1 :])]


def build_trainer(method: str, work: Workload, folder: Path, *callbacks: TrainerCallback) -> Trainer:
    """Build the Trainer of a method, with `callbacks` behind its own.

    Raises:
        InputError: The model cannot be loaded, takes no rows of this length, or has no such targets.
    """
    model, tokenizer = load_model(work.model, work.dtype)
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and work.length > longest:
        raise RecipeError(f"length is {work.length}, but {work.model} takes at most {longest} tokens")
    rows = random_rows(work, config.vocab_size)
    if method.startswith("trl"):
        trainer = _trl_trainer(method, work, folder, model, tokenizer, rows)
    else:
        recipe = work.recipe(method, str(folder / "run"))
        trainer = build(recipe, model, tokenizer, {"train": rows}, folder / "run").trainer
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def random_rows(work: Workload, vocabulary: int) -> Dataset:
    """Draw random rows for all steps.

    Returns:
        Columns of `tokenize_rows`: `input_ids`, `labels` (-100 except at the end of the row) and `length`.
    """
    count = work.batch_size * (work.warmup + work.steps)
    generator = torch.Generator().manual_seed(work.seed)
    ids = torch.randint(vocabulary, (count, work.length), generator=generator)
    labels = ids.clone()
    labels[:, : work.length - work.labels()] = -100
    columns = {"input_ids": ids.tolist(), "labels": labels.tolist(), "length": [work.length] * count}
    numbers = List(Value("int32"))
    features = Features({"input_ids": numbers, "labels": numbers, "length": Value("int32")})
    return Dataset.from_dict(columns, features=features)


def _trl_trainer(
    method: str, work: Workload, folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> Trainer:
    """TRL's trainer: only the workload is set, and nothing is saved or sent."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = {"gradient_checkpointing": False} if method == "trl-no-checkpointing" else {}
    arguments = SFTConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=work.batch_size,
        max_steps=work.warmup + work.steps,
        max_length=work.length,
        seed=work.seed,
        use_cpu=not torch.accelerator.is_available(),  # otherwise TRL's default of bf16 is refused on a CPU
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=work.rank, lora_alpha=2 * work.rank, target_modules=list(work.targets))
    dataset = rows.remove_columns("length")
    return SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)


def main(argv: list[str], build: Callable[..., Trainer] = build_trainer) -> int:
    """Measure the method that FOLDER/job.json names; return the exit code.

    Args:
        argv: The folder.
        build: Builds the Trainer of a method, as `build_trainer` does; other benchmarks add methods with it.
    """
    folder = Path(argv[0])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    clock = Clock()
    try:
        work = Workload(**{**job["workload"], "targets": tuple(job["workload"]["targets"])})
        trainer = build(job["task"], work, folder, clock)
        reset_peak_memory()  # loading a model may need more than training it
        trainer.train()
    except SiftuneError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")  # of the frozen weights
    trl = {"trl": version("trl")} if job["task"].startswith("trl") else {}
    result = {"seconds": clock.seconds(work.warmup), "peak_memory_mb": peak_memory_mb(), "dtype": dtype}
    result |= {"hardware": hardware(), "versions": {**versions(), **trl}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
