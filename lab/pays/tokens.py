"""Token-level selection, as a rival of whole rows: train on part of the label tokens.

    excess_t = loss of token t under the base − its loss under the model tuned on the target

The tokens with the highest excess train, a given share of all label tokens, as in Rho-1 (arXiv 2404.07965) and Token
Cleaning with a fixed model (arXiv 2502.01968); the others are read only.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from lab.commands import load_tuned
from lab.pays.measure import Floats, token_losses
from siftune.data.batches import Collator, by_length
from siftune.models.attention import short_rows
from siftune.models.loss import IGNORED
from siftune.models.modules import model_device
from siftune.recipe.schema import Recipe
from siftune.train import run
from siftune.train.build import Built

_BATCH = 64


@contextmanager
def on_tokens(share: float, out: str = "run") -> Iterator[None]:
    """Have the training in the folder `out`, sifted before by a target, learn a share of its label tokens."""
    build = run.build

    def build_cleaned(recipe: Recipe, model: Any, tokenizer: Any, data: Mapping[str, Dataset], *rest: Any) -> Built:
        if Path(str(recipe.out)).name == out:  # not the trainings of the sifting
            data = {**data, "train": _cleaned(data["train"], recipe, tokenizer, Path(str(recipe.out)), share)}
        return build(recipe, model, tokenizer, data, *rest)

    with patch.object(run, "build", build_cleaned):
        yield


def _cleaned(rows: Dataset, recipe: Recipe, tokenizer: Any, folder: Path, share: float) -> Dataset:
    """The rows without the labels of tokens that do not train."""
    losses = partial(_losses, rows, Collator(tokenizer.pad_token_id))
    before, after = (losses(load_tuned(name)[0]) for name in (str(recipe.model), str(folder / "sift" / "tuning")))
    excess = [first - second for first, second in zip(before, after, strict=True)]
    labels = highest(rows["labels"], excess, share)
    numbers = List(Value("int32"))
    cleaned = Dataset.from_dict({"labels": labels}, features=Features({"labels": numbers}))
    return concatenate_datasets([rows.remove_columns("labels"), cleaned], axis=1)


def _losses(rows: Dataset, collate: Collator, model: Any) -> list[Floats]:
    """Losses of each row's label tokens."""
    found: list[Floats] = [np.empty(0)] * len(rows)
    plain = rows.select_columns(["input_ids", "labels"])
    with short_rows():
        for places in by_length(list(rows["length"]), _BATCH):
            batch = collate([plain[place] for place in places])
            nll_N, _, row_N = token_losses(model, {k: v.to(model_device(model)) for k, v in batch.items()})
            for at, place in enumerate(places):
                found[place] = nll_N[row_N == at].double().cpu().numpy()
    return found


def highest(labels: Sequence[Sequence[int]], excess: Sequence[Floats], share: float) -> list[list[int]]:
    """Labels without those of the tokens whose excess is not among the highest.

    Args:
        labels: Of each row, -100 at tokens without a label; the first token is never predicted.
        excess: Of each row's label tokens.
        share: Share of the tokens to keep.

    Example:
        >>> highest([[-100, 7, 8], [-100, -100, 9]], [np.array([0.1, 3.0]), np.array([2.0])], 0.5)
        [[-100, -100, 8], [-100, -100, 9]]
    """
    limit = np.quantile(np.concatenate([*excess]), 1 - share, method="higher")
    kept = []
    for own, values in zip(labels, excess, strict=True):
        rest = iter(values >= limit)
        kept.append([IGNORED if label == IGNORED or (at and not next(rest)) else label for at, label in enumerate(own)])
    return kept
