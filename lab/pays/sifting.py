"""Sift a pool by the known rows, as `siftune sift`: by losses under a model tuned on them, and under the base model.

The losses are those of `siftune sift`, and so is the share that is selected if a job names none. Jobs that differ only
in what they do with the losses share them, in siftune's cache folder.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.models.smollm2 import cache_root
from siftune.recipe.schema import Recipe
from siftune.sifting.scores import Floats, choose, held_out_count, lowest, scores
from siftune.train.build import build

STEPS = 60  # on the known rows
_BATCH = 64
_KEY = ("cell", "model", "seed", "steps", "batch")  # of a job: they determine the pool

Loaded = tuple[nn.Module, PreTrainedTokenizerBase]


def losses_of(
    job: dict[str, Any], load: Callable[[], Loaded], recipe: Recipe, pool: Dataset, known: Dataset, folder: Path
) -> dict[str, Floats]:
    """Losses of the pool's rows, or those that another job left in the cache.

    Args:
        job: The job.
        load: Loads the base model.
        recipe: Settings of the tuning, resolved.
        pool: Tokens of the pool.
        known: Tokens of the known rows.
        folder: For what the Trainer leaves.

    Returns:
        `tuned` and `base`, each (rows,) in nats per label token, and the same of the known rows that were held out:
        `known_tuned` and `known_base`.
    """
    key = json.dumps([{name: job[name] for name in _KEY}, recipe.lr, recipe.steps], sort_keys=True)
    place = cache_root() / "lab-sifting" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if place.is_file():
        return dict(np.load(place))
    model, tokenizer = load()
    rows = len(known) - held_out_count(len(known))
    seen, unseen = known.select(range(rows)), known.select(range(rows, len(known)))
    losses = {"base": _losses(model, pool), "known_base": _losses(model, unseen)}
    built = build(recipe, model, tokenizer, {"train": seen}, folder / "sifting")
    built.trainer.train()
    losses |= {"tuned": _losses(built.trainer.model, pool), "known_tuned": _losses(built.trainer.model, unseen)}
    built.release()
    place.parent.mkdir(parents=True, exist_ok=True)
    np.savez(place, **losses)
    return losses


def _losses(model: nn.Module, data: Dataset) -> Floats:
    with short_rows():
        found = row_nll(model, list(zip(data["input_ids"], data["labels"], strict=True)), _BATCH)
    return found.nll / found.tokens


def sifted(losses: dict[str, Floats], share: float | None) -> list[int]:
    """Numbers of the rows that are selected, ascending; without a share, as many as `siftune sift` selects."""
    scores_R = scores(losses["tuned"], losses["base"])
    count = choose(scores_R, scores(losses["known_tuned"], losses["known_base"])).rows
    numbers: list[int] = lowest(scores_R, count if share is None else round(share * len(scores_R))).tolist()
    return numbers
