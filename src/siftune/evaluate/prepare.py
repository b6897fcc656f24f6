"""Choice of metrics for rows, and token ids for each metric.

| metric        | required of each row                                                                        |
|---------------|---------------------------------------------------------------------------------------------|
| `choices`     | `choices`, a list of texts, and `answer`: the index (from 0) or text of the right one;      |
|               | without `answer`, the completion is the right one                                           |
| `exact_match` | a prompt; the model's text must equal the completion or, if present, `answer`               |
| `perplexity`  | nothing more; the label tokens of training are measured                                     |

Prompts and completions are tokenised as in training (`siftune.data.encode`), so a choice includes the
end-of-turn token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from siftune.base.errors import DataError, RecipeError
from siftune.data.encode import Encoder, labelled
from siftune.data.rows import Row
from siftune.evaluate.generation import normalise
from siftune.evaluate.likelihood import ChoiceItem, TokenRow

METRICS = ("choices", "exact_match", "perplexity")
_SHORT = 32  # tokens: longer completions are prose, which no model repeats word by word
_SLACK = 4  # tokens that a model may spend on white space before or after its answer


@dataclass(frozen=True)
class Questions:
    """Inputs of generation: prompts, and the accepted texts for each.

    Attributes:
        prompts_ids: Token ids of each prompt.
        accepted: The accepted texts; none if the answers are only to be read.
        max_new_tokens: Largest number of new tokens.
        eos_ids: Token ids that end a text.
    """

    prompts_ids: list[list[int]]
    accepted: list[tuple[str, ...]]
    max_new_tokens: int
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """Rows in token ids for each requested metric; None for the others.

    Attributes:
        origins: Origin of each row, for messages.
        items: For `choices`.
        questions: For `exact_match`.
        sequences: For `perplexity`: input ids and labels.
        tokenizer: Decodes what the model writes.
    """

    origins: list[str]
    items: list[ChoiceItem] | None
    questions: Questions | None
    sequences: list[TokenRow] | None
    tokenizer: PreTrainedTokenizerBase


def prepare_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    metrics: Sequence[str] = ("auto",),
    template: str | Path = "auto",
    max_new_tokens: int | None = None,
) -> Prepared:
    """Turn rows into token ids for the requested metrics.

    Args:
        rows: At least one row.
        tokenizer: The model's tokenizer.
        metrics: Names out of `METRICS`, or `auto`: see `choose_metrics`.
        template: `chat`, `none`, or `auto` for the chat template if the tokenizer has one.
        max_new_tokens: Longest text to generate; by default a little over the longest right one.

    Raises:
        DataError: There are no rows, or a row lacks what a metric needs; the message names the row.
        RecipeError: No such metric or template.
    """
    if not rows:
        raise DataError("there are no rows to evaluate; give at least one")
    encoder = Encoder(tokenizer, template)
    chosen = choose_metrics(rows, encoder, metrics)
    return Prepared(
        origins=[row.origin for row in rows],
        items=[_item(row, encoder) for row in rows] if "choices" in chosen else None,
        questions=_questions(rows, encoder, max_new_tokens) if "exact_match" in chosen else None,
        sequences=_sequences(rows, encoder) if "perplexity" in chosen else None,
        tokenizer=tokenizer,
    )


def choose_metrics(rows: Sequence[Row], encoder: Encoder, metrics: Sequence[str] = ("auto",)) -> set[str]:
    """Check the names of metrics, and replace `auto` by those that fit the rows.

    `auto` always takes perplexity. It adds `choices` if every row has the column, otherwise `exact_match` if every
    row has a prompt and either the column `answer` or a completion of at most 32 tokens.

    Raises:
        RecipeError: A name is unknown, or there is none.
    """
    unknown = [name for name in metrics if name not in ("auto", *METRICS)]
    if unknown or not metrics:
        fault = f"unknown metric {unknown[0]!r}" if unknown else "no metric given"
        raise RecipeError(f"{fault}; use auto, {', '.join(METRICS)}")
    named = set(metrics) - {"auto"}
    if "auto" not in metrics:
        return named
    if all(row.extra.get("choices") is not None for row in rows):
        return named | {"perplexity", "choices"}
    short = all(_is_question(row, encoder) for row in rows)
    return named | {"perplexity"} | ({"exact_match"} if short else set())


def _is_question(row: Row, encoder: Encoder) -> bool:
    has_answer = row.extra.get("answer") is not None
    return bool(row.prompt) and (has_answer or len(encoder.completion(row)) <= _SHORT)


def _item(row: Row, encoder: Encoder) -> ChoiceItem:
    """One question for `choices`."""
    choices = _choices(row)
    ids = [encoder.completion(row, choice) for choice in choices]
    return ChoiceItem(_prompt(row, encoder), ids, _answer_index(row, choices))


def _choices(row: Row) -> list[str]:
    """Read the column `choices`."""
    choices: Any = row.extra.get("choices")
    texts = isinstance(choices, list) and all(isinstance(text, str) and text.strip() for text in choices)
    if not texts or len(choices) < 2 or len(set(choices)) < len(choices):
        raise DataError(
            f"{row.origin}: 'choices' is {_shown(choices)}; give a list of two different texts or more, or "
            "leave the metric 'choices' out"
        )
    return list(choices)


def _answer_index(row: Row, choices: list[str]) -> int:
    """Find the right choice by its index or text."""
    answer = row.extra.get("answer")
    answer = row.completion if answer is None else answer
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        alike = [i for i, choice in enumerate(choices) if normalise(choice) == normalise(answer)]
        if len(alike) == 1:
            return alike[0]
    raise DataError(
        f"{row.origin}: the answer {_shown(answer)} is none of the {len(choices)} choices; give its text or its "
        f"index from 0 to {len(choices) - 1}"
    )


def _questions(rows: Sequence[Row], encoder: Encoder, max_new_tokens: int | None) -> Questions:
    """Prompts and accepted texts for `exact_match`."""
    accepted = [_accepted(row) for row in rows]
    right_ids = [encoder.completion(row, text) for row, texts in zip(rows, accepted, strict=True) for text in texts]
    return Questions(
        prompts_ids=[_prompt(row, encoder) for row in rows],
        accepted=accepted,
        max_new_tokens=max_new_tokens or max(map(len, right_ids)) + _SLACK,
        eos_ids=_end_ids(encoder.tokenizer, [ids[-1] for ids in right_ids]),
    )


def open_questions(rows: Sequence[Row], encoder: Encoder, max_new_tokens: int) -> Questions:
    """Inputs of generation for prompts without right answers.

    Args:
        rows: At least one row of `rows.parse_question`.
        encoder: With the model's tokenizer.
        max_new_tokens: Largest number of new tokens.

    Raises:
        DataError: The chat template refuses a prompt, or a prompt has no token; the message names the row.
    """
    ends = [encoder.completion(rows[0], "a")[-1]]  # the same after any text
    prompts_ids = [_prompt(row, encoder) for row in rows]
    return Questions(prompts_ids, [() for _ in rows], max_new_tokens, _end_ids(encoder.tokenizer, ends))


def _accepted(row: Row) -> tuple[str, ...]:
    """Return the accepted texts: the completion and, if present, the column `answer`."""
    answer = row.extra.get("answer")
    if answer is None:
        return (row.completion,)
    if row.extra.get("choices") is not None:
        choices = _choices(row)
        answer = choices[_answer_index(row, choices)]
    if isinstance(answer, bool | list | dict):
        raise DataError(f"{row.origin}: 'answer' is {_shown(answer)}; give a text or a number")
    return tuple(dict.fromkeys((row.completion, str(answer))))


def _prompt(row: Row, encoder: Encoder) -> list[int]:
    """Token ids of a prompt, which must not be empty."""
    ids = encoder.prompt(row) if row.prompt else []
    if not ids:
        raise DataError(f"{row.origin}: the row has no prompt to answer; plain text has perplexity only")
    return ids


def _end_ids(tokenizer: PreTrainedTokenizerBase, last_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the end-of-sequence token, and the chat template's end-of-turn token if it differs."""
    marks = {i for i in last_ids if i in tokenizer.added_tokens_decoder}
    return tuple(sorted({tokenizer.eos_token_id, *marks}))


def _sequences(rows: Sequence[Row], encoder: Encoder) -> list[TokenRow]:
    """Input ids and labels, as in training."""
    return [labelled(pieces) for pieces in encoder.encode(rows)]


def _shown(value: Any) -> str:
    """Show a value in a message: missing, or cut to 60 characters."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
