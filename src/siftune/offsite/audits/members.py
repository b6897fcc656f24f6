"""The rows of an audit in token ids, and a model's scores on them, row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.base.errors import DataError
from siftune.data.encode import Encoder
from siftune.data.rows import Row
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.bootstrap import Floats
from siftune.evaluate.likelihood import TokenRow, perplexity
from siftune.evaluate.measure import measure
from siftune.evaluate.prepare import Prepared, choose_metrics, prepare_rows
from siftune.offsite.audits.settings import AuditSettings

_ACCURACIES = ("choices", "exact_match")


@dataclass(frozen=True)
class AuditRows:
    """Rows in token ids.

    Attributes:
        train: Rows to tune on, as `tokenize_rows` makes them.
        held_out: Rows of the same source to measure the loss on, made in the same way.
        questions: The held-out rows for an accuracy; None where there is none to measure.
    """

    train: Dataset
    held_out: Dataset
    questions: Prepared | None = None


@dataclass(frozen=True)
class RowScores:
    """One model's scores on the held-out rows (R of them)."""

    nll: Floats  # (R,) float64, negative log-likelihood in nats, summed over a row's label tokens
    tokens: Floats  # (R,) float64, label tokens of each row
    correct: Floats | None = None  # (R,) float64, 1 or 0; None where no accuracy was measured

    @property
    def per_token(self) -> Floats:
        """(R,) mean negative log-likelihood per label token."""
        return self.nll / self.tokens


def tokenize_audit(
    train: Sequence[Row], held_out: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: AuditSettings
) -> AuditRows:
    """Turn rows into token ids.

    Accuracy is multiple choice by log-likelihood if every held-out row has choices, otherwise exact match if all
    completions are short, otherwise not measured (see `evaluate.prepare`).

    Raises:
        DataError: There are no rows, or one of them cannot be used; the message names it.
        RecipeError: The template is demanded and there is none.
    """
    sets = [
        tokenize_rows(rows, tokenizer, settings.max_length, settings.template, settings.completion_only)
        for rows in (train, held_out)
    ]
    accuracy = sorted(choose_metrics(held_out, Encoder(tokenizer, settings.template)).intersection(_ACCURACIES))
    questions = prepare_rows(held_out, tokenizer, accuracy, settings.template) if accuracy else None
    return AuditRows(sets[0], sets[1], questions)


def accuracy_name(rows: AuditRows) -> str | None:
    """The accuracy that `score_rows` measures: `choices`, `exact_match` or None."""
    if rows.questions is None:
        return None
    return "choices" if rows.questions.items is not None else "exact_match"


def score_rows(model: nn.Module, rows: AuditRows, batch_size: int) -> RowScores:
    """Measure a model on the held-out rows.

    Raises:
        DataError: A row has no label, or doesn't fit the model's window.
    """
    scores = score_losses(model, rows.held_out, batch_size)
    name = accuracy_name(rows)
    if name is None or rows.questions is None:
        return scores
    return replace(scores, correct=measure(model, rows.questions, batch_size)[name].values)


def score_losses(model: nn.Module, data: Dataset, batch_size: int) -> RowScores:
    """Measure the loss alone, on any rows.

    Raises:
        DataError: A row has no label, or a loss that is not finite.
    """
    losses = perplexity(model, token_rows(data), batch_size)
    bare = np.flatnonzero(losses.tokens == 0)
    if bare.size:
        raise DataError(f"row {bare[0]} has no label after its first token, so it has no loss; leave it out")
    broken = np.flatnonzero(~np.isfinite(losses.nll))
    if broken.size:
        raise DataError(f"row {broken[0]}: the model's loss is not finite: leave the row out, or give --dtype float32")
    return RowScores(losses.nll, losses.tokens.astype(np.float64))


def token_rows(data: Dataset) -> list[TokenRow]:
    """Pairs of input ids and labels."""
    return list(zip(data["input_ids"], data["labels"], strict=True))


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up to one length."""
    number: int | None = tokenizer.pad_token_id
    return 0 if number is None else number


def drawn(indices: Sequence[int], count: int, seed: int) -> list[int]:
    """At most `count` of the indices, drawn without replacement, in their order."""
    if len(indices) <= count:
        return list(indices)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(indices), generator=generator)[:count]
    return [indices[place] for place in sorted(places.tolist())]


def not_among(data: Dataset, others: Dataset) -> list[int]:
    """Indices of the rows of which no copy, token by token, is among others."""
    copies = set(_keys(others))
    return [i for i, key in enumerate(_keys(data)) if key not in copies]


def _keys(data: Dataset) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for ids, labels in token_rows(data):
        yield tuple(ids), tuple(labels)
