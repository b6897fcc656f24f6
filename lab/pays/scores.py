"""Scores of a pool beside each other: losses after a training on the known rows, similarity of prompts, gradients.

python -m lab.pays.scores CELL --data FOLDER [--seed 0] [--known 100] [--pool] [--gradients] [--gast]

Printed are, for every score, the AUC of the target's rows against the rest and, if the pool has wrong rows, of correct
against wrong ones; low scores come first. For the change of the loss, also the shares of rows with a score below 0. The
last line has the share of the pool that `siftune sift` selects, and the shares of wrong rows before and after.
K is a row's loss after the training, B before it, in nats per token.

`--pool` also trains for as many steps on half of the pool, drawn at random; F is the loss after that.

`--gradients` compares each row's gradient after that training with those of the known rows, as in LESS: gradients.py.

`--gast` trains one pass over the pool with GAST on the known rows. A row's score is minus the mean of its scores in all
layers, when it came in a batch.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from lab.pays.cells import cells_of
from lab.pays.gradients import gradient_scores
from lab.pays.job import USUAL, recipe_of
from lab.pays.methods import method_of
from lab.pays.pool import asked, make_pool
from lab.pays.sifting import STEPS, losses_under
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.methods.drivers.sample_callback import SampleCallback
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.models.load import load_model
from siftune.models.loss import IGNORED
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.sifting.scores import Floats, choose, held_out_count, of_task
from siftune.sifting.similarity import embed, nearest, prompt_of
from siftune.train.build import build
from siftune.train.trainer import SiftTrainer

_AT = (3, 6, 10, 20, 30, 40, 60)  # steps after which the pool is scored
_ALSO = ("pool", "gradients", "gast")


def auc(low: Floats, high: Floats) -> float:
    """Probability that a value of `low` is below one of `high`, without ties.

    Example:
        >>> auc(np.array([1.0, 3.0]), np.array([2.0, 4.0]))
        0.75
    """
    ranks = np.concatenate([low, high]).argsort().argsort()[: len(low)] + 1
    return float(1 - (ranks.sum() - len(low) * (len(low) + 1) / 2) / (len(low) * len(high)))


class Work:
    """A pool with its known rows, and scores of it.

    Args:
        job: Cell, seed, model, steps and batch.
        data: Folder of the commonsense suite.
    """

    def __init__(self, job: dict[str, Any], data: Path) -> None:
        self.job = job
        self.model, tokenizer = load_model(job["model"], "auto")
        self.tokenizer = tokenizer
        rows = make_pool(job, data, lambda row: len(tokenizer("".join(asked(row).values()))["input_ids"]) + 1)
        self.groups = np.array([row["group"] for row in rows.train])
        self.pool, known = (
            tokenize_rows(rows_from([asked(row) for row in part]), tokenizer, 512, "none", True)
            for part in (rows.train, rows.known)
        )
        seen = len(known) - held_out_count(len(known))
        self.seen, self.held_out = known.select(range(seen)), known.select(range(seen, len(known)))
        self.selected_R = np.zeros(len(self.pool), bool)  # by `siftune sift`, after `scores`
        self.held_out_scores: dict[int, Floats] = {}  # K − B of the held-out known rows, after some steps

    def scores(self, also: Sequence[str]) -> dict[str, Floats]:
        """The scores by their names, each (rows,); `also` may have "pool", "gradients" and "gast"."""
        before, after = losses_under(self.model, self.pool), dict[int, Floats]()
        held_out_before = losses_under(self.model, self.held_out)
        similar_R, similar_T = self._similarities()
        scores = {"prompts": -similar_R}
        tuned = self._tuned(self.seen, after)
        last = after[STEPS]
        self.held_out_scores = {steps: losses - held_out_before for steps, losses in self.held_out_scores.items()}
        held_out = self.held_out_scores[STEPS]
        self.selected_R = choose(last - before, held_out, of_task(similar_R, similar_T)).rows_R
        scores |= {f"K − B, {steps} steps": losses - before for steps, losses in after.items()}
        ranks = last.argsort().argsort() + (last - before).argsort().argsort()
        tokens = np.array([sum(label != IGNORED for label in row[1:]) for row in self.pool["labels"]])
        scores |= {"K": last, "2K − B": 2 * last - before, "K / B": last / before, "ranks of K and K − B": ranks}
        scores["K − B, summed over tokens"] = (last - before) * tokens
        if "gradients" in also:
            scores |= gradient_scores(tuned.model, tuned.optimizer, self.pool, self.seen)
        if "pool" in also:
            self.model, _ = load_model(self.job["model"], "auto")
            half = np.random.default_rng(self.job["seed"]).permutation(len(self.pool))[: len(self.pool) // 2]
            other = self._tuned(self.pool.select(half.tolist()), {})
            scores["K − F"] = last - losses_under(other.model, self.pool)
        if "gast" in also:
            scores["GAST"] = self._while_training()
        return scores

    def _while_training(self) -> Floats:
        """Minus the mean score of each row over the layers, in one pass of GAST over the pool."""
        self.model, _ = load_model(self.job["model"], "auto")
        scores_R = np.full(len(self.pool), np.nan)

        def note(choice: SampleChoice) -> None:
            assert choice.rows is not None
            scores_R[choice.rows.numpy()] = -choice.scores.mean(0).numpy()

        job = {**self.job, "method": method_of("gast"), "lr": 5e-4}
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_of(job, Path(folder))
            data = {"train": self.pool, "support": self.seen}
            built = build(recipe, self.model, self.tokenizer, data, Path(folder))
            for part in built.methods:
                if isinstance(part, SampleCallback):
                    part.on_select = note
            built.trainer.train()
        assert np.isfinite(scores_R).all()
        return scores_R

    def _similarities(self) -> tuple[Floats, Floats]:
        """Similarity of the prompts of the pool, and of the held-out rows, to those of the other known rows."""
        prompts = [
            [prompt_of(ids, labels) for ids, labels in zip(part["input_ids"], part["labels"], strict=True)]
            for part in (self.pool, self.held_out, self.seen)
        ]
        pool_RH, held_out_TH, seen_KH = (embed(self.model, texts) for texts in prompts)
        mean_H = pool_RH.mean(0)
        similar_R, similar_T = (nearest(part, seen_KH, mean_H).double().numpy() for part in (pool_RH, held_out_TH))
        return similar_R, similar_T

    def _tuned(self, rows: Dataset, after: dict[int, Floats]) -> SiftTrainer:
        """Train as `siftune sift`. If the rows are the known ones, `after` gets the pool's losses after some steps.

        The model keeps its hooks of training.
        """
        pool, held_out, at = self.pool, self.held_out, _AT if rows is self.seen else ()
        after_held_out = self.held_out_scores

        class Score(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                if state.global_step in at:
                    after[state.global_step] = losses_under(others["model"], pool)
                    after_held_out[state.global_step] = losses_under(others["model"], held_out)
                    others["model"].train()

        with tempfile.TemporaryDirectory() as folder:
            settings = {**USUAL, "seed": self.job["seed"], "model": self.job["model"], "steps": STEPS, "lr": 5e-4}
            recipe = resolve_recipe(Recipe(**settings, train="known", out=folder))
            built = build(recipe, self.model, self.tokenizer, {"train": rows}, Path(folder))
            built.trainer.add_callback(Score())
            built.trainer.train()
        return built.trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the scores' figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--known", type=int, default=100)
    for name in _ALSO:
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    cell = cells_of("S1", [options.cell], options.known)[0]
    job = {"cell": cell, "seed": options.seed, "steps": 120, "batch": 16, "model": "smollm2"}
    work = Work(job, options.data)
    target, wrong = work.groups == "target", work.groups == "wrong"
    for name, values in work.scores([name for name in _ALSO if getattr(options, name)]).items():
        line = f"{name:52} target against the rest {auc(values[target], values[~target]):.3f}"
        if wrong.any():
            line += f"  correct against wrong {auc(values[target], values[wrong]):.3f}"
            line += f"  against other tasks {auc(values[target], values[~target & ~wrong]):.3f}"
        if "steps" in name:
            held_out = work.held_out_scores[int(name.split()[-2])]
            line += f"  below 0: target {(values[target] < 0).mean():.0%}, others {(values[~target] < 0).mean():.0%}"
            line += f", held-out {(held_out < 0).mean():.0%}"
        print(line)
    selected_R = work.selected_R
    shares = f"wrong {wrong.mean():.0%} before, {wrong[selected_R].mean():.0%} after"
    print(f"selected {selected_R.mean():.0%}, of the target {selected_R[target].mean():.0%}; {shares}")


if __name__ == "__main__":
    main()
