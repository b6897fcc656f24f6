"""Sift a pool by the known rows, as `siftune sift`: by prompts, and by losses under a model tuned on the known rows.

The losses are those of `siftune sift`, and so is the share that is selected if a job names none. Jobs that differ only
in what they do with the losses share them, in siftune's cache folder.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.models.smollm2 import cache_root
from siftune.recipe.schema import Recipe
from siftune.sifting.scores import (
    Floats,
    choose,
    held_out_count,
    lowest,
    of_task,
    scores,
    too_few,
    training_lengths,
)
from siftune.sifting.similarity import embed, nearest, prompt_of
from siftune.train.build import build

STEPS = 60  # on the known rows
_BATCH = 64
_KEY = ("cell", "model", "seed", "steps", "batch")  # of a job: they determine the pool

Loaded = tuple[nn.Module, PreTrainedTokenizerBase]


def losses_of(
    job: dict[str, Any],
    load: Callable[[], Loaded],
    recipe: Recipe,
    pool: Dataset,
    known: Dataset,
    folder: Path,
    selected: Sequence[int] = (),
) -> dict[str, Floats]:
    """Losses of the pool's rows, or those that another job left in the cache.

    Args:
        job: The job.
        load: Loads the base model.
        recipe: Settings of the tuning, resolved.
        pool: Tokens of the pool.
        known: Tokens of the known rows.
        folder: For what the Trainer leaves.
        selected: Numbers of rows of the pool that an earlier sifting selected: the tuning takes them as well.

    Returns:
        `tuned` and `base`, each (rows,) in nats per label token, `similar`, (rows,) the similarity of the prompts, and
        the same of the known rows that were held out: `known_tuned`, `known_base` and `known_similar`.
    """
    fields = [{name: job[name] for name in _KEY}, recipe.lr, recipe.steps, *([list(selected)] if selected else [])]
    key = json.dumps(fields, sort_keys=True)
    place = cache_root() / "lab-sifting" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    losses = dict(np.load(place)) if place.is_file() else {}
    if "similar" in losses:
        return losses
    model, tokenizer = load()
    count = len(known) - held_out_count(len(known))
    seen, unseen = known.select(range(count)), known.select(range(count, len(known)))
    with short_rows():
        pool_RH, seen_KH, unseen_KH = (embed(model, _prompts(data), _BATCH) for data in (pool, seen, unseen))
    mean_H = pool_RH.mean(0)
    similar = {"similar": nearest(pool_RH, seen_KH, mean_H), "known_similar": nearest(unseen_KH, seen_KH, mean_H)}
    losses |= {name: np.asarray(value.numpy(), np.float64) for name, value in similar.items()}
    if "tuned" not in losses:
        losses |= {"base": losses_under(model, pool), "known_base": losses_under(model, unseen)}
        rows = concatenate_datasets([seen, pool.select(selected)]) if selected else seen
        for steps in training_lengths(recipe.steps or STEPS):
            built = build(replace(recipe, steps=steps), load()[0], tokenizer, {"train": rows}, folder / "sifting")
            built.trainer.train()
            losses["known_tuned"] = losses_under(built.trainer.model, unseen)
            if not too_few(scores(losses["known_tuned"], losses["known_base"])):
                break
        losses["tuned"] = losses_under(built.trainer.model, pool)
        built.release()
    place.parent.mkdir(parents=True, exist_ok=True)
    np.savez(place, **losses)
    return losses


def _prompts(data: Dataset) -> list[Sequence[int]]:
    return [prompt_of(ids, labels) for ids, labels in zip(data["input_ids"], data["labels"], strict=True)]


def losses_under(model: nn.Module, data: Dataset) -> Floats:
    """Losses of rows, (rows,) in nats per label token."""
    with short_rows():
        found = row_nll(model, list(zip(data["input_ids"], data["labels"], strict=True)), _BATCH)
    return found.nll / found.tokens


def sifted(losses: dict[str, Floats], share: float | None) -> list[int]:
    """Numbers of the rows that are selected, ascending; without a share, those that `siftune sift` selects."""
    scores_R = scores(losses["tuned"], losses["base"])
    known_T = scores(losses["known_tuned"], losses["known_base"])
    task_R = of_task(losses["similar"], losses["known_similar"])
    if share is None:
        rows_R = choose(scores_R, known_T, task_R).rows_R
    else:
        rows_R = lowest(scores_R, round(share * len(scores_R)), task_R)
    numbers: list[int] = rows_R.nonzero()[0].tolist()
    return numbers


def soft_weights(losses: dict[str, Floats]) -> list[float]:
    """Weights of the rows: 1 / (1 + exp(score)) for those of the task, 0 for others."""
    scores_R = scores(losses["tuned"], losses["base"])
    task_R = of_task(losses["similar"], losses["known_similar"])
    weights: list[float] = np.where(task_R, 1 / (1 + np.exp(scores_R)), 0.0).tolist()
    return weights


def most_alike(scores_R: Tensor, share: float) -> Sequence[int]:
    """Numbers of the share of the rows, at least one, with the highest scores; ascending, the first of equal ones."""
    count = max(1, round(share * len(scores_R)))
    numbers: list[int] = scores_R.argsort(descending=True, stable=True)[:count].sort().values.tolist()
    return numbers
