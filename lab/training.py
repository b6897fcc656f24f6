"""Training of a job in this process, for experiments that add to it: penalties, records of rows, other adapters.

Experiments that compare commands use `lab.commands` instead.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from lab.models import source
from lab.pays.measure import measure_rows, nats_per_token
from lab.pays.pool import Pool, asked
from siftune.bench.worker import Clock
from siftune.data.batches import Collator
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.models.load import load_model
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.train.build import Built, build
from siftune.train.trainer import SiftTrainer

Record = dict[str, Any]
Job = dict[str, Any]

_LONGEST = 512  # tokens of a row
USUAL = {"method": "dense", "rank": 32, "attention": "eager", "template": "none", "log_every": 1000}


def recipe_of(job: Job, folder: Path) -> Recipe:
    """Make a job's recipe, checked; nothing is read from the files that it names.

    Args:
        job: The job.
        folder: For the run, and for a file that is read back.
    """
    own = {"batch_size": job["batch"], **{name: job[name] for name in ("lr", "seed", "steps", "model")}}
    values = {**USUAL, **own, **job["method"].get("recipe", {}), "train": "pool", "out": str(folder)}
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    recipe: Recipe = resolve_recipe(load_recipe(file))
    check(recipe)
    return recipe


def load(job: Job) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of a job, fresh, and its tokenizer."""
    return load_model(source(job["model"]), job["method"].get("recipe", {}).get("dtype", "auto"))


@dataclass
class Work:
    """One job with its model and rows.

    Attributes:
        job: The job.
        model: The base model; it gets the adapter in place.
        tokenizer: Its tokenizer.
        pool: The rows.
        folder: For what the Trainer leaves.
    """

    job: Job
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    pool: Pool
    folder: Path

    @property
    def method(self) -> Record:
        """The job's method."""
        return self.job["method"]

    @property
    def collate(self) -> Collator:
        """Makes batches."""
        return Collator(self.tokenizer.pad_token_id)

    def tokenized(self, rows: Sequence[Record], completion_only: bool = True) -> Dataset:
        """Tokenise rows, without a chat template; questions as `asked`, text as it is."""
        rows = [asked(row) if "prompt" in row else row for row in rows]
        return tokenize_rows(rows_from(rows), self.tokenizer, _LONGEST, "none", completion_only)

    def run(self) -> Record:
        """Train and measure."""
        data = {"train": self.tokenized(self.pool.train)}
        built = build(recipe_of(self.job, self.folder), self.model, self.tokenizer, data, self.folder / "checkpoints")
        self._add_to(built)
        line = {"steps": 0} if self.method.get("untrained") else self._train(built.trainer)
        built.release()
        with use_base_dtype(built.trainer.model, group_by_layer(built.trainer.model)):  # as in training
            return {**self._measure(built.trainer.model), **line, "rows": len(self.pool.train)}

    def _add_to(self, built: Built) -> None:
        """Change a Trainer before it trains."""

    def _train(self, trainer: SiftTrainer) -> Record:
        clock = Clock()
        trainer.add_callback(clock)
        processor = time.process_time()
        trainer.train()
        steps = trainer.state.global_step
        return {
            "steps": steps,
            **({"seconds_per_step": round(float(np.mean(clock.seconds(1))), 4)} if steps > 1 else {}),
            "processor_seconds_per_step": round((time.process_time() - processor) / steps, 4),
        }

    def _measure(self, model: nn.Module) -> Record:
        """Held-out rows of the target."""
        test, dev = (
            measure_rows(model, self.tokenized(rows), self.collate) for rows in (self.pool.test, self.pool.dev)
        )
        return {**test, "dev_nats": round(nats_per_token(dev), 5)}
