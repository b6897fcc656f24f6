"""Scores of a pool beside each other: losses after a training on the known rows, similarity of prompts, gradients.

python -m lab.pays.scores CELL --data FOLDER [--seed 0] [--known 100] [--gradients]

Printed are, for every score, the AUC of the target's rows against the rest and, if the pool has wrong rows, of correct
against wrong ones; low scores come first. For the change of the loss, also the shares of rows with a score below 0.

`--gradients` forms the gradient of each row's loss with respect to LoRA's parameters after that training, row by row,
and compares it with the mean of the known rows' normalised gradients by cosine, as in LESS (arXiv 2402.04333).
Unlike LESS: no projection, one checkpoint, and no preconditioning by Adam.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from lab.pays.cells import cells_of
from lab.pays.job import _USUAL
from lab.pays.pool import asked, make_pool
from lab.pays.sifting import STEPS, _losses
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.models.load import load_model
from siftune.models.modules import evaluating
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.sifting.scores import Floats, held_out_count
from siftune.sifting.similarity import embed, nearest, prompt_of
from siftune.train.build import build

_AT = (10, 20, 30, 60)  # steps after which the pool is scored


def auc(low: Floats, high: Floats) -> float:
    """Probability that a value of `low` is below one of `high`, without ties.

    Example:
        >>> auc(np.array([1.0, 3.0]), np.array([2.0, 4.0]))
        0.75
    """
    ranks = np.concatenate([low, high]).argsort().argsort()[: len(low)] + 1
    return float(1 - (ranks.sum() - len(low) * (len(low) + 1) / 2) / (len(low) * len(high)))


def _gradient(model: nn.Module, row: dict[str, Any]) -> list[torch.Tensor]:
    """Gradient of a row's loss with respect to LoRA's parameters: a vector for each layer."""
    model.zero_grad()
    labels = torch.tensor(row["labels"])[1:]
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
    nn.functional.cross_entropy(logits, labels).backward()
    layers: dict[int, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(int(name.split("layers.")[1].split(".")[0]), []).append(parameter.grad.float().flatten())
    return [torch.cat(layers[layer]) for layer in sorted(layers)]


def cosines(model: nn.Module, pool: Dataset, known: Dataset) -> dict[str, Floats]:
    """Scores by gradients, each (rows,): minus the cosine of all parameters, and minus the means over layers."""
    target: list[torch.Tensor] = []
    dots, norms = np.zeros((len(pool), 0)), np.zeros((len(pool), 0))
    with evaluating(model), torch.enable_grad():
        for row in known:
            own = _gradient(model, row)
            length = torch.stack([vector.norm() for vector in own]).norm()
            own = [vector / length for vector in own]
            target = [a + b for a, b in zip(target, own, strict=True)] if target else own
        dots, norms = (np.zeros((len(pool), len(target))) for _ in range(2))
        for number, row in enumerate(pool):
            own = _gradient(model, row)
            dots[number] = [float(a @ b) for a, b in zip(target, own, strict=True)]
            norms[number] = [float(vector.norm()) for vector in own]
    by_layer = dots / norms / [float(vector.norm()) for vector in target]
    return {
        "gradients: cosine": -dots.sum(1) / np.linalg.norm(norms, axis=1),
        "gradients: mean of layers": -by_layer.mean(1),
        "gradients: ranks by layer": -by_layer.argsort(0).argsort(0).mean(1),
    }


def scores_of(job: dict[str, Any], data: Path, with_gradients: bool) -> tuple[list[str], dict[str, Floats]]:
    """Groups of the pool's rows, and the scores by their names, each (rows,)."""
    model, tokenizer = load_model(job["model"], "auto")

    def length(row: dict[str, Any]) -> int:
        return len(tokenizer("".join(asked(row).values()))["input_ids"]) + 1

    rows = make_pool(job, data, length)
    pool, known = (
        tokenize_rows(rows_from([asked(row) for row in part]), tokenizer, 512, "none", True)
        for part in (rows.train, rows.known)
    )
    seen = known.select(range(len(known) - held_out_count(len(known))))
    prompts = [
        [prompt_of(ids, labels) for ids, labels in zip(part["input_ids"], part["labels"], strict=True)]
        for part in (pool, seen)
    ]
    pool_RH, seen_KH = (embed(model, texts) for texts in prompts)
    values_of: dict[str, Floats] = {"prompts": -nearest(pool_RH, seen_KH, pool_RH.mean(0)).double().numpy()}
    before = _losses(model, pool)

    class Score(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step in _AT:
                values_of[f"K − B, {state.global_step} steps"] = _losses(others["model"], pool) - before
                others["model"].train()

    with tempfile.TemporaryDirectory() as folder:
        settings = {**_USUAL, "seed": job["seed"], "model": job["model"], "steps": STEPS, "lr": 5e-4}
        recipe = resolve_recipe(Recipe(**settings, train="known", out=folder))
        built = build(recipe, model, tokenizer, {"train": seen}, Path(folder))
        built.trainer.add_callback(Score())
        built.trainer.train()
        values_of["K"] = values_of[f"K − B, {STEPS} steps"] + before
        built.release()
        if with_gradients:
            values_of |= cosines(built.trainer.model, pool, seen)
    return [row["group"] for row in rows.train], values_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the scores' figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--known", type=int, default=100)
    parser.add_argument("--gradients", action="store_true")
    options = parser.parse_args(arguments)
    cell = cells_of("S1", [options.cell], options.known)[0]
    job = {"cell": cell, "seed": options.seed, "steps": 120, "batch": 16, "model": "smollm2"}
    groups, values_of = scores_of(job, options.data, options.gradients)
    target, wrong = np.array(groups) == "target", np.array(groups) == "wrong"
    for name, values in values_of.items():
        line = f"{name:28} target against the rest {auc(values[target], values[~target]):.3f}"
        if wrong.any():
            line += f"  correct against wrong {auc(values[target], values[wrong]):.3f}"
        if name.startswith("K − B"):
            line += f"  below 0: target {(values[target] < 0).mean():.0%}, others {(values[~target] < 0).mean():.0%}"
        print(line)


if __name__ == "__main__":
    main()
