"""One job in a process of its own: `python -m pays.job OUT DATA` reads it from stdin and adds a line to OUT."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from lab.lines import work_off
from lab.pays.gemma import folder as gemma_folder
from lab.pays.gradients import gradient_scores
from lab.pays.measure import measure_rows, nats_per_token
from lab.pays.pool import Pool, asked, make_pool
from lab.pays.sifting import STEPS, Loaded, losses_of, most_alike, sifted, soft_weights
from lab.pays.subset import Book, Followed, SubsetTrainer
from lab.pays.training_rows import training_rows
from siftune.bench.worker import Clock
from siftune.data.batches import AIMED, Collator
from siftune.data.rows import WEIGHT, rows_from
from siftune.data.tokens import tokenize_rows
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.methods.dp import callback as dp
from siftune.methods.dp.secret import Secret
from siftune.methods.drivers.sample_callback import SampleCallback
from siftune.methods.drivers.sample_choice import ALL_LAYERS, SampleChoice
from siftune.models.load import load_model
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe, compares, resolve_recipe
from siftune.sifting.similarity import embed
from siftune.train.build import Built, build
from siftune.train.trainer import SiftTrainer

Record = dict[str, Any]
Job = dict[str, Any]

_LONGEST = 512  # tokens of a row
_SHARE = 0.25  # of the pool that retrieval keeps
_TUNING_LR = 5e-4  # of the tuning on the known rows, before sifting
USUAL = {"method": "dense", "rank": 32, "attention": "eager", "template": "none", "log_every": 1000}


def recipe_of(job: Job, folder: Path) -> Recipe:
    """Make a job's recipe, checked; nothing is read from the files that it names.

    Args:
        job: The job.
        folder: For the run, and for a file that is read back.
    """
    method = job["method"]
    own = {"batch_size": job["batch"], **{name: job[name] for name in ("lr", "seed", "steps", "model")}}
    values = {**USUAL, **own, **method.get("recipe", {}), "train": "pool", "out": str(folder)}
    groups = [value for value in values.values() if isinstance(value, dict)]
    kinds = {group.get("support") for group in groups}
    if "late" in method:
        values |= {"target": "known", "target_last": method["late"]}
    elif "dataset" in kinds:
        values |= {"target": "known", "target_share": 0.0}
    file = folder / "pays.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    recipe: Recipe = resolve_recipe(load_recipe(file))
    check(recipe)
    return recipe


@dataclass
class Work:
    """One job with what it is done on.

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
    seconds_sifting: float | None = None  # of the processor

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
        known, count = self.pool.known, self.job["steps"] * self.job["batch"]
        rows = training_rows(self.method.get("rows", "pool"), self.pool.train, known, count, self._chosen)
        recipe = recipe_of(self.job, self.folder)
        data = {"train": self.tokenized(rows)}
        if "late" in self.method:
            own = {id(row) for row in known}
            data["train"] = data["train"].add_column(AIMED, [id(row) in own for row in rows])
        if "soft" in self.method:
            data["train"] = data["train"].add_column(WEIGHT, [row.get(WEIGHT, 1.0) for row in rows])
        if compares(recipe):
            data["support"] = self.tokenized(known)
        built = build(recipe, self.model, self.tokenizer, data, self.folder / "checkpoints")
        trainer = self._take_over(built, rows)
        found = {"steps": 0} if self.method.get("untrained") else self._train(trainer)
        built.release()
        with use_base_dtype(trainer.model, group_by_layer(trainer.model)):  # as in training; release() took that off
            sifting = {} if self.seconds_sifting is None else {"seconds_sifting": round(self.seconds_sifting, 1)}
            return {**self._measure(trainer.model), **found, **sifting, "rows": len(rows)}

    def _chosen(self, plan: str) -> list[Record]:
        """Rows of the pool that a plan keeps."""
        started = time.process_time()
        pool, known = self.tokenized(self.pool.train), self.tokenized(self.pool.known)
        settings = {**USUAL, **{name: self.job[name] for name in ("seed", "model")}, "steps": STEPS}
        recipe = resolve_recipe(Recipe(**settings, lr=_TUNING_LR, train="known", out=str(self.folder)))
        if plan == "sifted":
            numbers: list[int] = []
            for _ in range(self.method.get("rounds", 1)):
                losses = losses_of(self.job, lambda: _load(self.job), recipe, pool, known, self.folder, numbers)
                numbers = sifted(losses, self.method.get("share"))
            self.seconds_sifting = time.process_time() - started
            if "soft" in self.method:
                pairs = zip(self.pool.train, soft_weights(losses), strict=True)
                return [{**row, WEIGHT: weight} for row, weight in pairs if weight]
        elif plan == "less":
            model, tokenizer = _load(self.job)
            trainer = build(recipe, model, tokenizer, {"train": known}, self.folder / "sifting").trainer
            trainer.train()
            scores = gradient_scores(trainer.model, trainer.optimizer, pool, known)
            alike_R = -torch.from_numpy(scores["gradients in Adam's metric, cosine"])
            numbers = list(most_alike(alike_R, self.method.get("share", _SHARE)))
            self.seconds_sifting = time.process_time() - started
        else:
            pool_RH, known_KH = (embed(self.model, part["input_ids"]) for part in (pool, known))
            numbers = list(most_alike((pool_RH @ known_KH.T).amax(1), self.method.get("share", _SHARE)))
        return [self.pool.train[number] for number in numbers]

    def _take_over(self, built: Built, rows: Sequence[Record]) -> SiftTrainer:
        """Have the Trainer keep rows by the method's rule, and count what is followed; or another engine's privacy."""
        if built.trainer.privacy is not None:
            from lab.dp_trainers import TRAINERS  # imports Opacus

            return (
                TRAINERS[self.method["engine"]].take_over(built.trainer) if "engine" in self.method else built.trainer
            )
        followed, ceiling = Followed([row["group"] for row in rows]), self.method.get("keep") == "target"
        book = Book(built.trainer.train_dataset, rows)
        trainer = SubsetTrainer.take_over(built.trainer, book, followed, ceiling)
        for part in built.methods:
            if isinstance(part, SampleCallback):
                part.on_select = partial(_note, trainer, built.depth)
        return trainer

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
            **(trainer.followed.summary(steps) if isinstance(trainer, SubsetTrainer) else {}),
        }

    def _measure(self, model: nn.Module) -> Record:
        """Held-out rows: the target's one by one, sums of the others."""
        started = time.perf_counter()
        found: Record = measure_rows(model, self.tokenized(self.pool.test), self.collate)
        dev = measure_rows(model, self.tokenized(self.pool.dev), self.collate)
        others = {name: self.tokenized(rows) for name, rows in self.pool.other.items()}
        others["text"] = self.tokenized(self.pool.text, completion_only=False)
        nats = {name: nats_per_token(measure_rows(model, data, self.collate)) for name, data in others.items()}
        return {
            **found,
            "dev_nats": round(nats_per_token(dev), 5),
            "other_nats": {name: round(value, 5) for name, value in nats.items()},
            "seconds_measuring": round(time.perf_counter() - started, 2),
        }


def _note(trainer: SubsetTrainer, depth: int, samples: SampleChoice) -> None:
    """Count the rows that a method followed in a batch."""
    for layer, numbers in zip(samples.layers, samples.selected.tolist(), strict=True):
        place = None if layer == ALL_LAYERS else max(0, layer) / depth
        trainer.followed.follow(samples.step, place, [trainer.seen[number] for number in numbers])


def _load(job: Job) -> Loaded:
    source = str(gemma_folder()) if job["model"] == "gemma3" else job["model"]
    return load_model(source, job["method"].get("recipe", {}).get("dtype", "auto"))


def run_job(job: Job, data: Path, folder: Path) -> Record:
    """Load, draw, train and measure.

    Args:
        job: The job.
        data: Folder of the commonsense suite.
        folder: For what the Trainer leaves.
    """
    model, tokenizer = _load(job)
    pool = make_pool(job, data, lambda row: len(tokenizer("".join(asked(row).values()))["input_ids"]) + 1)
    dtype = str(model.dtype).removeprefix("torch.")
    result = Work(job, model, tokenizer, pool, folder).run()
    return {**result, "dtype": dtype}


def main(argv: list[str]) -> int:
    """Work off the job of standard input; return the exit code."""

    def run(job: Job, data: Path, folder: Path) -> tuple[Record, str]:
        dp.Secret = lambda: Secret(job["seed"])  # private runs of a seed draw the same rows
        result = run_job(job, data, folder)
        return result, f"{np.mean(result['right']):.3f} right, {nats_per_token(result):.3f} nats"

    return work_off(argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
