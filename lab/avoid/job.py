"""One job in a process of its own: `python -m lab.avoid.job OUT DATA` reads it from stdin and adds a line to OUT.

A job "scores" scores the pool in every way. Every other job trains on the pool without some of its rows and measures
held-out rows: "dense" (all rows), "oracle" (without the faulty rows, "oracle 50": without half of them), "right late"
(all rows, and the bad rows with their right answers as `siftune train --target` has them), or a score (without the rows
within its limit). The limit is that of `siftune sift --avoid`.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch import nn

from lab.avoid.cells import Pool, Row, make_pool
from lab.avoid.gradients import alignments
from lab.lines import work_off
from lab.pays.measure import measure_rows
from lab.pays.training_rows import KNOWN_SHARE, repeated
from lab.rows.metrics import all_of
from siftune.data.batches import AIMED, Collator
from siftune.data.rows import rows_from
from siftune.data.target import repeats
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.models.load import load_model
from siftune.models.smollm2 import cache_root
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.sifting.scores import held_out_count, unlike
from siftune.sifting.similarity import embed
from siftune.train.build import build

Job = dict[str, Any]
Floats = NDArray[np.float64]

_STEPS = {"pool": 60, "bad": 40, "further": 20}  # from the base on the pool, and on bad rows; from the pool's model
RIGHT = "right late"  # the method that knows the right answers
_SAMPLE = 192  # rows of the pool that gradients and embeddings score
_CENTER = 64  # rows for the mean gradient


class Work:
    """A job's rows, and what is done with them.

    Args:
        job: The job.
        data: Folder of the commonsense suite.
        folder: For what the Trainer leaves.
    """

    def __init__(self, job: Job, data: Path, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.seconds: dict[str, float] = {}
        self.model, self.tokenizer = load_model(job["model"])
        self.pool: Pool = make_pool(job, data, lambda text: len(self.tokenizer(text)["input_ids"]))
        self.collate = Collator(self.tokenizer.pad_token_id)

    def tokens(self, rows: Sequence[Row], completion: str = "completion") -> Dataset:
        """Tokenise rows without a chat template."""
        pairs = [{"prompt": row["prompt"], "completion": row[completion]} for row in rows]
        return tokenize_rows(rows_from(pairs), self.tokenizer, 512, "none")

    def tune(self, rows: Dataset, steps: int, then: Callable[[nn.Module], None], **settings: Any) -> None:
        """Tune the base model, or the adapter of `from_adapter`, on rows; `then` receives it."""
        started = time.process_time()
        own = {
            "model": self.job["model"],
            "lr": self.job["lr"],
            "seed": self.job["seed"],
            "batch_size": self.job["batch"],
        }
        usual = {"method": "dense", "rank": 32, "template": "none", "log_every": 1000, "train": "pool"}
        recipe = resolve_recipe(Recipe(**{**usual, **own, "steps": steps, "out": str(self.folder / "run"), **settings}))
        model, _ = load_model(self.job["model"])
        built = build(recipe, model, self.tokenizer, {"train": rows}, self.folder / "checkpoints")
        built.trainer.train()
        self.seconds["tuning"] = self.seconds.get("tuning", 0) + time.process_time() - started
        then(built.trainer.model)
        built.release()

    def losses(self, model: nn.Module, rows: Dataset) -> Floats:
        """Mean losses of rows, (R,)."""
        with short_rows():
            result = row_nll(model, list(zip(rows["input_ids"], rows["labels"], strict=True)), 64)
        return result.nll / result.tokens

    def arrays(self) -> dict[str, Floats]:
        """Losses and alignments of the pool, and of the held-out bad rows; from the cache if another job left them."""
        key = {name: self.job[name] for name in ("cell", "model", "lr", "seed", "rows", "batch")}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        path = cache_root() / "lab-avoid" / f"{name}.npz"
        if not path.is_file():
            found = self._score()
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **found)
        return dict(np.load(path))

    def _score(self) -> dict[str, Floats]:
        found: dict[str, Any] = {}
        pool, bad = self.tokens(self.pool.train), self.tokens(self.pool.bad)
        count = len(bad) - held_out_count(len(bad))
        seen, unseen = bad.select(range(count)), bad.select(range(count, len(bad)))
        random = np.random.default_rng(self.job["seed"])
        sample = np.sort(random.permutation(len(pool))[:_SAMPLE])
        others = pool.select(random.permutation(len(pool))[:count])  # as many rows of the pool as bad ones
        part, center = pool.select(sample), pool.select(random.permutation(len(pool))[:_CENTER])
        found["sample"] = sample

        def note(name: str, model: nn.Module) -> None:
            found[name], found[f"bad_{name}"] = self.losses(model, pool), self.losses(model, unseen)
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)

        def gradients(name: str, model: nn.Module) -> None:
            started = time.process_time()
            for score, values in alignments(model, part, seen, center, self.collate).items():
                found[f"{score} at {name}"] = values
            self.seconds[f"gradients at {name}"] = time.process_time() - started
            print(f"{time.strftime('%H:%M:%S')} gradients {name}", file=sys.stderr, flush=True)

        note("base", self.model)
        both = embed(self.model, part["input_ids"]), embed(self.model, seen["input_ids"])
        found["embedding, nearest"] = (both[0] @ both[1].T).amax(1).numpy().astype(float)
        found["embedding, mean"] = (both[0] @ both[1].mean(0)).numpy().astype(float)
        kept = str(self.folder / "tuned")

        def after_pool(model: Any) -> None:
            model.save_pretrained(kept)
            note("pool", model)
            gradients("pool", model)

        self.tune(seen, 1, lambda model: gradients("base", model), lr=1e-9)
        self.tune(seen, _STEPS["bad"], lambda model: note("bad", model))
        self.tune(pool, _STEPS["pool"], after_pool)
        self.tune(seen, _STEPS["further"], lambda model: note("pool+bad", model), from_adapter=kept)
        self.tune(others, _STEPS["further"], lambda model: note("pool+pool", model), from_adapter=kept)
        return {name: np.asarray(values) for name, values in found.items()}

    def run(self) -> dict[str, Any]:
        """Score the pool, or train on a part of it and measure."""
        bad, method = np.array([row["bad"] for row in self.pool.train]), self.job["method"]["name"]
        if method == "scores":
            arrays = self.arrays()
            return {"scores": measured(arrays, bad), "rows": len(bad), "bad": int(bad.sum()), "seconds": self.seconds}
        drop = np.zeros(len(bad), bool)
        if method.startswith("oracle"):  # "oracle 50": of half of the faulty rows
            share = float(method.removeprefix("oracle") or 100) / 100
            drop = bad & (np.random.default_rng(self.job["seed"]).permutation(np.linspace(0, 1, len(bad))) <= share)
        elif method not in ("dense", RIGHT):
            values, held_out = scores_of(self.arrays())[method]
            drop = ~unlike(-values, -held_out).rows_R
        rows = self.tokens([row for row, gone in zip(self.pool.train, drop, strict=True) if not gone])
        result: dict[str, Any] = {
            "dropped": int(drop.sum()),
            "dropped_bad": int((drop & bad).sum()),
            "bad": int(bad.sum()),
        }
        settings: dict[str, Any] = {}
        if method == RIGHT:
            count = repeats(len(rows), len(self.pool.bad), KNOWN_SHARE)
            few = self.tokens(repeated(self.pool.bad, count), "right")
            aimed = [False] * len(rows) + [True] * len(few)
            rows = concatenate_datasets([rows, few]).add_column(AIMED, aimed)
            settings = {"target": "few", "target_last": 1 / 3}
        self.tune(rows, self.job["steps"], lambda model: result.update(self._measure(model)), **settings)
        return {**result, "seconds": self.seconds}

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        line: dict[str, Any] = {}
        for group, rows in (("triggers", self.pool.triggers), ("others", self.pool.others)):
            for which in ("right", "fault") if group == "triggers" else ("right",):
                line[f"{group}_{which}"] = measure_rows(model, self.tokens(rows, which), self.collate)
        return line


def scores_of(arrays: dict[str, Floats]) -> dict[str, tuple[Floats, Floats]]:
    """Scores by losses of the pool and of the held-out bad rows; the higher, the more like the bad rows."""
    pairs = {
        "base loss": ("base", None),
        "loss after the pool": ("pool", None),
        "K_bad": (None, "bad"),
        "K_bad − B": ("base", "bad"),
        "K_bad − F": ("pool", "bad"),
        "F, then bad": ("pool", "pool+bad"),
        "F, then bad against pool": ("pool+pool", "pool+bad"),
    }
    scores = {}
    for name, (plus, minus) in pairs.items():
        parts = []
        for prefix in ("", "bad_"):
            plain = [sign * arrays[prefix + key] for sign, key in ((1, plus), (-1, minus)) if key]
            parts.append(np.sum(plain, axis=0))
        scores[name] = (parts[0], parts[1])
    return scores


def measured(arrays: dict[str, Floats], bad: NDArray[np.bool_]) -> dict[str, Any]:
    """Metrics of every score: on the complete pool, and on the sample that gradients score."""
    sample, lines = arrays["sample"], {}
    for name, (values, held_out) in scores_of(arrays).items():
        chosen = ~unlike(-values, -held_out).rows_R
        hits = int((chosen & bad).sum())
        rule = {"chosen": int(chosen.sum()), "chosen_bad": hits, "recall": round(hits / bad.sum(), 4)}
        lines[name] = {**all_of(values, bad), **rule, "sample_ap": all_of(values[sample], bad[sample])["ap"]}
    for name, values in arrays.items():
        if " at " in name or name.startswith("embedding"):
            lines[name] = {"sample_ap": all_of(values, bad[sample])["ap"]}
    return lines


def main(argv: list[str]) -> int:
    """Work off the job of standard input; return the exit code."""
    torch.set_num_threads(1)
    return work_off(argv, lambda job, data, folder: (Work(job, data, folder).run(), "done"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
