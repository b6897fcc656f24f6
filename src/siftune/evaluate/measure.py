"""Metrics of a model on rows, and the comparison of a base model with its tuned version."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.base.errors import DataError
from siftune.base.files import Progress
from siftune.data.encode import attempt
from siftune.evaluate.bootstrap import Bootstrap, accuracy_interval, paired_bootstrap
from siftune.evaluate.generation import exact_match, greedy
from siftune.evaluate.likelihood import perplexity, score_choices
from siftune.evaluate.prepare import Prepared, Questions
from siftune.models.attention import short_rows
from siftune.models.modules import check_window

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Metric:
    """One metric of one model, row by row.

    Attributes:
        name: `choices`, `choices_per_token`, `exact_match` or `perplexity`.
        values: (R,) float64, 1 or 0 for right or wrong; for perplexity, the negative log-likelihood in nats.
        weights: (R,) float64, 1; for perplexity, the number of tokens.
        texts: What the model wrote, for `exact_match`; otherwise empty.
    """

    name: str
    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    texts: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The rate of right rows, between 0 and 1; or the perplexity over all tokens."""
        mean = float(self.values.sum() / self.weights.sum())
        return float(np.exp(mean)) if self.name == PERPLEXITY else mean

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Wilson's interval of a rate; None for perplexity, whose rows aren't right or wrong."""
        return None if self.name == PERPLEXITY else accuracy_interval(self.values, level)


Metrics = dict[str, Metric]


@dataclass(frozen=True)
class MetricRow:
    """One metric of one or two models.

    Attributes:
        metric: Its name.
        rows: How many rows it was measured on.
        base: The base model's value: a rate between 0 and 1, or a perplexity.
        tuned: The tuned model's value; None, as the following, without a tuned model.
        difference: tuned − base.
        low: Lower bound of the difference's paired bootstrap interval.
        high: Upper bound.
        base_interval: Wilson's interval of the base's rate; None for perplexity.
        tuned_interval: The same of the tuned model's.
    """

    metric: str
    rows: int
    base: float
    tuned: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    base_interval: tuple[float, float] | None = None
    tuned_interval: tuple[float, float] | None = None


def measure(model: nn.Module, prepared: Prepared, batch_size: int = 16, progress: Progress | None = None) -> Metrics:
    """Measure a model on prepared rows.

    Results depend on the batch size, the number of threads and the machine by rounding, which changes few answers in
    bfloat16. Compare models that were measured with the same.

    Args:
        model: A causal language model, PEFT-wrapped or not; it's put into eval mode and back.
        prepared: The rows.
        batch_size: Rows, or choices, per forward pass.
        progress: Receives the number of rows and choices that are done.

    Raises:
        DataError: A row doesn't fit the model's window, or its loss isn't finite.
    """
    _check_window(model, prepared)
    with short_rows():
        measured = list(_measured(model, prepared, batch_size, progress))
    return {metric.name: metric for metric in measured}


def _measured(model: nn.Module, prepared: Prepared, batch_size: int, progress: Progress | None) -> Iterator[Metric]:
    if prepared.items is not None:
        scores = score_choices(model, prepared.items, batch_size, progress)
        _refuse_losses(prepared, np.array([np.isnan(each).any() for each in scores.loglik]))  # argmax would pick them
        yield _rate("choices", scores.correct())
        yield _rate("choices_per_token", scores.correct(normalised=True))
    if prepared.questions is not None:
        yield _exact_match(model, prepared.questions, prepared.tokenizer, batch_size, progress)
    if prepared.sequences is not None:
        result = perplexity(model, prepared.sequences, batch_size, progress)
        _refuse_losses(prepared, ~np.isfinite(result.nll))
        yield Metric(PERPLEXITY, result.nll, result.tokens.astype(np.float64))


def compare(
    base: Mapping[str, Metric], tuned: Mapping[str, Metric] | None = None, level: float = 0.95, seed: int = 0
) -> list[MetricRow]:
    """Compare two models on the same rows, metric by metric.

    Args:
        base: Metrics of the base model.
        tuned: Metrics of the tuned model; None for a table of one model.
        level: Coverage of the intervals.
        seed: Seed of the paired bootstrap.

    Raises:
        ValueError: The two were measured with other metrics or on other rows.
    """
    if tuned is not None and list(base) != list(tuned):
        raise ValueError(f"base has the metrics {list(base)}, tuned has {list(tuned)}; measure the same ones")
    return [_metric_row(metric, tuned[name] if tuned else None, level, seed) for name, metric in base.items()]


def _metric_row(base: Metric, tuned: Metric | None, level: float, seed: int) -> MetricRow:
    one = MetricRow(base.name, len(base.values), base.value, base_interval=base.interval(level))
    if tuned is None:
        return one
    if not np.array_equal(base.weights, tuned.weights):
        raise ValueError(f"{base.name}: base and tuned were measured on other rows or with another tokenizer")
    transform = np.exp if base.name == PERPLEXITY else None
    bootstrap = Bootstrap(level=level, seed=seed)
    change = paired_bootstrap(base.values, tuned.values, bootstrap, weights=base.weights, transform=transform)
    return replace(
        one,
        tuned=tuned.value,
        difference=change.value,
        low=change.low,
        high=change.high,
        tuned_interval=tuned.interval(level),
    )


def _refuse_losses(prepared: Prepared, broken_R: NDArray[np.bool_]) -> None:
    """Refuse losses that are no numbers, by the first such row's place in the file."""
    if broken_R.any():
        raise DataError(
            f"{prepared.origins[int(broken_R.argmax())]}: the model's loss is not finite: leave the row out, or give "
            "--dtype float32"
        )


def _rate(name: str, correct: NDArray[np.bool_], texts: Iterable[str] = ()) -> Metric:
    return Metric(name, correct.astype(np.float64), np.ones(len(correct)), tuple(texts))


class Answer(NamedTuple):
    """What a model writes after a prompt.

    Attributes:
        text: The text, without special tokens.
        complete: Whether the model ended it; False if it is cut at the largest number of new tokens.
    """

    text: str
    complete: bool


def answers(
    model: Any,
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Answer]:
    """Have a model answer questions, with the likeliest token at each step, in their order.

    A text ends at an end token of the questions or of the model's own generation settings. `progress` receives the
    number of answers.

    Raises:
        AdapterError: The adapter adds virtual tokens.
        DataError: The tokenizer fails on tokens that the model wrote.
    """
    own = model.generation_config.eos_token_id
    eos_ids = {*questions.eos_ids, *([own] if isinstance(own, int) else own or [])}
    limit, pad_id = questions.max_new_tokens, tokenizer.pad_token_id or 0
    written = greedy(model, questions.prompts_ids, limit, batch_size, pad_id, tuple(eos_ids), progress)
    return [Answer(_decoded(tokenizer, ids), len(ids) < limit) for ids in written]


def _exact_match(
    model: Any, questions: Questions, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Progress | None
) -> Metric:
    """Generate, and compare with each accepted text."""
    texts = [answer.text for answer in answers(model, questions, tokenizer, batch_size, progress)]
    pairs = zip(texts, questions.accepted, strict=True)
    correct = [bool(exact_match([text] * len(right), right).any()) for text, right in pairs]
    return _rate("exact_match", np.array(correct, dtype=np.bool_), texts)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode generated tokens; the tokenizer is untrusted."""
    text = attempt(lambda: tokenizer.decode(ids, skip_special_tokens=True))
    if isinstance(text, BaseException):
        reason = " ".join(str(text).split())[:99]
        raise DataError(
            f"the tokenizer fails on tokens that the model wrote, {list(ids)[:8]} ({reason}); take another tokenizer"
        ) from text
    return str(text)


def _check_window(model: Any, prepared: Prepared) -> None:
    """Refuse rows that are longer than the model's window, by their place in the file."""
    for origin, length in zip(prepared.origins, _lengths(prepared), strict=True):
        check_window(model, length, f"{origin}: the row", "shorten or remove it")


def _lengths(prepared: Prepared) -> list[int]:
    """Tokens that each row takes at most."""
    lengths = [0] * len(prepared.origins)
    for i in range(len(lengths)):
        if prepared.items is not None:
            item = prepared.items[i]
            lengths[i] = len(item.prompt_ids) + max(map(len, item.choices_ids))
        if prepared.questions is not None:
            longest = len(prepared.questions.prompts_ids[i]) + prepared.questions.max_new_tokens
            lengths[i] = max(lengths[i], longest)
        if prepared.sequences is not None:
            lengths[i] = max(lengths[i], len(prepared.sequences[i][0]))
    return lengths
