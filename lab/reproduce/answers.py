"""Answers of a model to a task's questions, and their file.

Up to three values for a question:

    generated   1 or 0, whether the first option's name in the model's greedy answer is the correct one
    likeliest   1 or 0, whether the correct option has the highest probability
    nats        −ln p of the correct answer's text, which has this many tokens
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from siftune.base.errors import RecipeError
from siftune.base.files import write_beside
from siftune.data.rows import Row
from siftune.evaluate.measure import measure
from siftune.evaluate.prepare import Prepared, prepare_rows

METRICS = {"generated": "exact_match", "likeliest": "choices", "nats": "perplexity"}  # -> metric of siftune.evaluate
_MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Scores:
    """A metric, question by question.

    Attributes:
        values: Right or wrong; for `nats`, the sum over the answer's tokens.
        weights: 1 each; for `nats`, the number of tokens.
    """

    values: Sequence[float]
    weights: Sequence[float]


@dataclass(frozen=True)
class Answers:
    """The file with the answers to one task, which may not exist yet."""

    path: Path

    def scores(self, metric: str) -> Scores | None:
        """Scores by a metric; None if the questions were not asked so.

        Raises:
            RecipeError: The file is damaged.
        """
        scores = self._record().get(metric)
        return scores and Scores(scores["values"], scores["weights"])

    def add(self, scores: Mapping[str, Scores], texts: Sequence[str]) -> None:
        """Write scores, and the texts of the answers, beside what is there."""
        record = self._record() | {name: vars(one) for name, one in scores.items()}
        record |= {"texts": texts} if texts else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(self.path) as [beside]:
            beside.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")

    def _record(self) -> dict[str, Any]:
        return read_record(self.path) if self.path.exists() else {}


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        metrics: Some of METRICS.
        template: As in a recipe.
        batch_size: Rows in a forward pass.
        ends: Whether an option ends with the mark that ends a text, as in training, when options are compared.
    """

    metrics: Sequence[str]
    template: str
    batch_size: int
    ends: bool = True

    def missing(self, answers: Answers) -> list[str]:
        """Metrics that a file does not have yet."""
        return [name for name in self.metrics if answers.scores(name) is None]


def ask(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], answers: Answers, asking: Asking) -> None:
    """Ask a task's questions by the metrics that its file lacks, and write the answers.

    Raises:
        DataError: A row does not fit the model's window.
    """
    metrics = {name: METRICS[name] for name in asking.missing(answers)}
    prepared = prepare_rows(rows, tokenizer, sorted(metrics.values()), asking.template, _MAX_NEW_TOKENS)
    measured = measure(model, prepared if asking.ends else _open_ended(prepared), asking.batch_size)
    scores = {}
    for name, source in metrics.items():
        values, weights = measured[source].values.tolist(), measured[source].weights.tolist()
        if name == "generated":
            texts = measured[source].texts
            values = [float(_is_right(row.extra, text)) for row, text in zip(rows, texts, strict=True)]
        scores[name] = Scores(values, weights)
    answers.add(scores, measured["exact_match"].texts if "generated" in metrics else ())


def first_option(text: str, options: Sequence[str]) -> str | None:
    """The option whose name comes first in a text; None without any. Letter case counts.

    LLM-Adapters' evaluation reads answers in this way, whatever stands around the name: "true" in "untrue" counts, too.

    Example:
        >>> first_option("the correct answer is answer2, not answer1", ["answer1", "answer2"])
        'answer2'
    """
    match = re.search("|".join(map(re.escape, sorted(options, key=len, reverse=True))), text)
    return match and match[0]


def read_record(path: Path) -> dict[str, Any]:
    """Contents of a file of JSON.

    Raises:
        RecipeError: It is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise RecipeError(f"{path} is damaged: remove it, so that it is made anew")
    return record


def _open_ended(prepared: Prepared) -> Prepared:
    """The options without the mark at the end."""
    end = prepared.tokenizer.eos_token_id
    items = prepared.items and [
        replace(item, choices_ids=[ids[:-1] if ids[-1] == end else ids for ids in item.choices_ids])
        for item in prepared.items
    ]
    return replace(prepared, items=items)


def _is_right(question: Mapping[str, Any], text: str) -> bool:
    options = [choice.rpartition(" ")[2] for choice in question["choices"]]
    return first_option(text, options) == options[question["answer"]]
