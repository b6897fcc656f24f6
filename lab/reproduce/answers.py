"""Answers of a model to a task's questions, and their file.

Up to three values for a question:

    generated   1 or 0, whether the text that the model writes, greedily, has the right answer in it
    likeliest   1 or 0, whether the right option is the one of the highest probability; where there are no options but
                texts that count, whether the model writes one of them when it takes the likeliest token each time
    nats        −ln p of the right answer's text, which has this many tokens
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lab.reproduce.answer_text import begins_with, is_right
from lab.reproduce.tasks import Task
from siftune.base.errors import RecipeError
from siftune.base.files import write_beside
from siftune.data.rows import Row
from siftune.evaluate.measure import Metric, measure
from siftune.evaluate.prepare import Prepared, prepare_rows

METRICS = ("generated", "likeliest", "nats")


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
    """The file with the answers to one task.

    Attributes:
        path: Where it is, or will be.
    """

    path: Path

    def scores(self, metric: str) -> Scores | None:
        """What was found; None where the questions have not been asked so.

        Raises:
            RecipeError: The file is damaged.
        """
        kept = self._kept().get(metric)
        return kept and Scores(kept["values"], kept["weights"])

    def add(self, found: Mapping[str, Scores], texts: Sequence[str]) -> None:
        """Write what was found, beside what is there."""
        kept = self._kept() | {name: vars(scores) for name, scores in found.items()}
        kept |= {"texts": texts} if texts else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(self.path) as [beside]:
            beside.write_text(json.dumps(kept, ensure_ascii=False) + "\n", encoding="utf-8")

    def _kept(self) -> dict[str, Any]:
        return read_record(self.path) if self.path.exists() else {}


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        metrics: Which of METRICS are wanted.
        template: As in a recipe.
        max_new_tokens: Longest text that is written.
        batch_size: Rows in a forward pass.
        ends: Whether an option ends with the mark that ends a text, as in training, when options are compared.
    """

    metrics: Sequence[str]
    template: str
    max_new_tokens: int
    batch_size: int
    ends: bool = True

    def missing(self, answers: Answers, task: Task) -> list[str]:
        """The metrics that the task has and that are not known yet."""
        return [name for name in self.metrics if _source(name, task) and answers.scores(name) is None]


def ask(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], task: Task, answers: Answers, asking: Asking
) -> None:
    """Ask a task's questions, and write the answers.

    Args:
        model: A causal language model, PEFT-wrapped or not.
        tokenizer: Its tokenizer.
        rows: The questions.
        task: The task.
        answers: Where to write; only metrics that are not there are asked.
        asking: How to ask.

    Raises:
        DataError: A row lacks what a metric needs, or does not fit the model's window.
    """
    wanted = {name: source for name in asking.missing(answers, task) if (source := _source(name, task))}
    prepared = prepare_rows(rows, tokenizer, sorted(set(wanted.values())), asking.template, asking.max_new_tokens)
    found = measure(model, prepared if asking.ends else _open_ended(prepared), asking.batch_size)
    scores = {}
    for name, source in wanted.items():
        metric = found[source]
        values = _right(rows, metric, task) if source == "exact_match" else metric.values.tolist()
        scores[name] = Scores(values, metric.weights.tolist())
    answers.add(scores, found["exact_match"].texts if "exact_match" in found else ())


def read_record(path: Path) -> dict[str, Any]:
    """Contents of a file of answers.

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


def _source(name: str, task: Task) -> str | None:
    """The metric of `evaluate` behind one of METRICS; None where the task has none."""
    if name == "likeliest":
        return {"option": "choices", "text": "exact_match"}.get(task.reader)
    return "perplexity" if name == "nats" else "exact_match"


def _open_ended(prepared: Prepared) -> Prepared:
    """The options without the mark at the end."""
    end = prepared.tokenizer.eos_token_id
    items = prepared.items and [
        replace(item, choices_ids=[ids[:-1] if ids[-1] == end else ids for ids in item.choices_ids])
        for item in prepared.items
    ]
    return replace(prepared, items=items)


def _right(rows: Sequence[Row], metric: Metric, task: Task) -> list[float]:
    return [float(_is_right(row.extra, text, task)) for row, text in zip(rows, metric.texts, strict=True)]


def _is_right(question: Mapping[str, Any], text: str, task: Task) -> bool:
    if task.reader == "text":
        return begins_with(text, question["accepted"])
    options = [choice.rpartition(" ")[2] for choice in question.get("choices", ())]
    answer = options[question["answer"]] if options else str(question["answer"])
    return is_right(text, answer, task.reader, options)
