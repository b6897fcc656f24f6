"""Rules that choose rows of a pool, as rivals of sifting.

| rule        | rows                                                                                              |
|-------------|---------------------------------------------------------------------------------------------------|
| `oracle`    | the correct rows of the task, all of them                                                         |
| `random`    | drawn evenly                                                                                      |
| `retrieved` | the most similar prompts, as siftune compares them, without its losses                            |
| `rds`       | RDS+ (arXiv 2503.01807): hidden states of prompt and answer, picked by the target's rows in turn  |
| `less`      | LESS (arXiv 2402.04333): gradients after a training on the target's rows; `gradients.py`          |
| `ifd`       | instruction-following difficulty (arXiv 2308.12032): the prompt helps least with the answer       |

But for the oracle, all choose the same number of rows. Shapes: R rows of the pool, K of the target, B of a batch, T
positions, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from lab.commands import load_tuned
from lab.pays.gradients import gradient_scores
from lab.pays.measure import tokens_of_file
from siftune.data.batches import by_length
from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.models.loss import IGNORED
from siftune.models.modules import evaluating, model_device
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.sifting.similarity import embed, nearest, prompt_of
from siftune.train.build import build

_BATCH = 64


@dataclass(frozen=True)
class Candidates:
    """The rows that a rule chooses from: pool.jsonl by few.jsonl, in the working directory.

    Attributes:
        groups: Group of each row of the pool; the oracle alone looks at it.
        count: Rows to choose.
        settings: Fields of a recipe: model, template, seed, batch_size.
    """

    groups: Sequence[str]
    count: int
    settings: Mapping[str, Any]

    @cached_property
    def base(self) -> tuple[Any, Any]:
        """Model, which a rule may train, and tokenizer."""
        return load_tuned(self.settings["model"])

    @cached_property
    def pool(self) -> Dataset:
        """Tokens of the pool."""
        return tokens_of_file("pool.jsonl", self.base[1], self.settings["template"])

    @cached_property
    def few(self) -> Dataset:
        """Tokens of the target's rows."""
        return tokens_of_file("few.jsonl", self.base[1], self.settings["template"])


def choose(rule: str, candidates: Candidates) -> list[int]:
    """Numbers of the rows that a rule chooses, ascending."""
    with short_rows():
        return sorted(RULES[rule](candidates))


def _oracle(rows: Candidates) -> list[int]:
    return [number for number, group in enumerate(rows.groups) if group == "target"]


def _random(rows: Candidates) -> list[int]:
    return np.random.default_rng(rows.settings["seed"]).permutation(len(rows.groups))[: rows.count].tolist()


def _retrieved(rows: Candidates) -> list[int]:
    pool_RH, few_KH = (
        embed(rows.base[0], [prompt_of(ids, labels) for ids, labels in _pairs(part)], _BATCH)
        for part in (rows.pool, rows.few)
    )
    return _highest(nearest(pool_RH, few_KH, pool_RH.mean(0)).numpy(), rows.count)


def _rds(rows: Candidates) -> list[int]:
    pool_RH, few_KH = (weighted_states(rows.base[0], part["input_ids"]) for part in (rows.pool, rows.few))
    return in_turn(few_KH @ pool_RH.T, rows.count)


def weighted_states(model: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """Means of the last hidden states, with weights that grow evenly from the first token; (R, H), each of length 1."""
    states_RH: list[Tensor] = [torch.empty(0)] * len(texts)
    with evaluating(model):
        for places in by_length([len(text) for text in texts], _BATCH):
            own = [torch.tensor(texts[place]) for place in places]
            ids_BT = nn.utils.rnn.pad_sequence(own, batch_first=True).to(model_device(model))
            lengths_B = torch.tensor([len(text) for text in own])
            place_BT = torch.arange(1, ids_BT.shape[1] + 1).expand(ids_BT.shape)
            weights_BT = torch.where(place_BT <= lengths_B[:, None], place_BT, 0).to(ids_BT.device)
            output = model.base_model(input_ids=ids_BT, attention_mask=(weights_BT > 0).long(), use_cache=False)
            sums_BH = torch.einsum("bt,bth->bh", weights_BT.float(), output.last_hidden_state.float())
            for place, state_H in zip(places, nn.functional.normalize(sums_BH, dim=1).cpu(), strict=True):
                states_RH[place] = state_H
    return torch.stack(states_RH)


def in_turn(similar_KR: Tensor, count: int) -> list[int]:
    """Rows of the pool that the target's rows pick in turn, each the most similar one that is left.

    Example:
        >>> in_turn(torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, 0.5]]), 2)
        [0, 1]
    """
    orders = [iter(row.tolist()) for row in similar_KR.argsort(dim=1, descending=True, stable=True)]
    picked: dict[int, None] = {}
    for order in cycle(orders):
        if len(picked) >= min(count, similar_KR.shape[1]):
            return [*picked]
        picked[next(number for number in order if number not in picked)] = None
    return []


def _less(rows: Candidates) -> list[int]:
    recipe = resolve_recipe(Recipe(**{**rows.settings, "train": "few.jsonl", "out": "less", "steps": 60, "lr": 5e-4}))
    trainer = build(recipe, *rows.base, {"train": rows.few}, Path("less")).trainer
    trainer.train()
    scores = gradient_scores(trainer.model, trainer.optimizer, rows.pool, rows.few)
    return _highest(-scores["gradients in Adam's metric, cosine"], rows.count)


def _ifd(rows: Candidates) -> list[int]:
    model, tokenizer = rows.base
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    answers = [[token for token in labels if token != IGNORED] for labels in rows.pool["labels"]]
    alone = [([first, *answer], [IGNORED, *answer]) for answer in answers]  # ours: the first token is predicted too
    with_prompt, without = (row_nll(model, part, _BATCH) for part in (_pairs(rows.pool), alone))
    return hardest((with_prompt.nll / with_prompt.tokens) / (without.nll / without.tokens), rows.count)


def hardest(ratios_R: Any, count: int) -> list[int]:
    """Rows with the highest ratios below 1, then those with the lowest above.

    Example:
        >>> hardest(np.array([0.2, 0.9, 1.5, 1.1]), 3)
        [1, 0, 3]
    """
    return np.where(ratios_R < 1, -ratios_R, ratios_R + 1).argsort(kind="stable")[:count].tolist()


def _highest(scores_R: Any, count: int) -> list[int]:
    """The rows with the highest scores, the first of equal ones."""
    return np.argsort(-np.asarray(scores_R), kind="stable")[:count].tolist()


def _pairs(data: Dataset) -> list[tuple[Sequence[int], Sequence[int]]]:
    return list(zip(data["input_ids"], data["labels"], strict=True))


RULES: dict[str, Callable[[Candidates], list[int]]] = {
    "oracle": _oracle,
    "random": _random,
    "retrieved": _retrieved,
    "rds": _rds,
    "less": _less,
    "ifd": _ifd,
}
