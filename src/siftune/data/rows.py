"""Rows of training and evaluation data, and their four formats.

| format     | columns                          | labels                                             |
|------------|----------------------------------|----------------------------------------------------|
| `prompt`   | `prompt`, `completion`           | the completion; both are strings, or conversations |
| `messages` | `messages`, or `conversations`   | every turn of the assistant                        |
| `alpaca`   | `instruction`, `input`, `output` | the output, after instruction, blank line, input   |
| `text`     | `text`                           | all of it                                          |

A conversation is a list of `{role, content}`, or of `{from, value}` with the roles human and gpt, as in ShareGPT. Pairs
such as `prompt=question` give the names of columns in the data. All other columns are in `Row.extra`. Among these,
`weight` is the row's weight in training. A turn of the assistant with `weight` 0 has no labels, as in OpenAI's format.

A conversation ends with its last turn of the assistant: turns of the user after it have no answer and are left out.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from siftune.base.errors import DataError, RecipeError
from siftune.base.text import one_line
from siftune.data.turns import Message, kind_of, string_of, turns_of

WEIGHT = "weight"  # column of a row's weight in training

Format = Literal["prompt", "messages", "alpaca", "text"]
Record = dict[str, Any]

# a row that has the columns of several formats is read as the first of them
_REQUIRED: dict[Format, tuple[str, ...]] = {
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL: dict[Format, tuple[str, ...]] = {"messages": ("conversations",), "alpaca": ("input",)}
_LONGEST = 2**22  # characters of a row (ours)
_SUPPORTED = "prompt + completion; messages or conversations; instruction (+ input) + output; text"


@dataclass(frozen=True)
class Row:
    """One example: the turns before the completion, and the completion.

    Attributes:
        prompt: the turns before the completion; one user turn for a plain string; empty for plain text, which
            no chat template changes.
        completion: the answer; for plain text, the text.
        origin: place of the row, for messages: `data/rows.jsonl:17`.
        extra: columns outside the format, such as `answer` and `choices`.
        of_target: whether the row is one of the target's, among the training rows.
        unanswered: number of turns of the user after the completion, which are left out.
    """

    prompt: tuple[Message, ...]
    completion: str
    origin: str
    extra: Record = field(default_factory=dict)
    of_target: bool = False
    unanswered: int = 0

    @property
    def weight(self) -> float:
        """Weight of the row in training: its column `weight`, by default 1.

        Raises:
            DataError: It is no finite number from 0.
        """
        return _weight(self.extra.get(WEIGHT), self.origin)

    def last_answer(self) -> Row:
        """The row without labels before its completion, for losses that are compared between answers."""
        if not any(turn.learned for turn in self.prompt):
            return self
        return replace(self, prompt=tuple(replace(turn, learned=False) for turn in self.prompt))


def rows_from(records: Iterable[Record], name: str = "row", columns: Sequence[str] = ()) -> list[Row]:
    """Turn dictionaries that are already in memory into rows.

    Args:
        records: one dictionary per row, in any supported format.
        name: what messages call the data; rows are counted from 1.
        columns: other names of columns, as for `parse_rows`.

    Raises:
        DataError: a row does not fit the format.
        RecipeError: a pair in `columns` is wrong.
    """
    return parse_rows(((f"{name} {number}", record) for number, record in enumerate(records, 1)), columns)


def parse_rows(
    records: Iterable[tuple[str, Any]],
    columns: Sequence[str] = (),
    bad: list[DataError] | None = None,
    questions: bool = False,
) -> list[Row]:
    """Turn pairs of an origin and a record into rows. The columns of the first row determine the format.

    Args:
        records: origin and record; a `DataError` if it cannot be read.
        columns: pairs such as `prompt=question`: the name here, and the name of the column. The format is then one
            that has the former.
        bad: list for the errors of bad rows, which are then left out.
        questions: read prompts to answer, as `parse_question`.

    Raises:
        DataError, RecipeError: as `rows_from`.
    """
    parse = parse_question if questions else parse_row
    names = _pairs(columns)
    chosen: Format | None = None
    rows: list[Row] = []
    for origin, record in records:
        try:
            renamed = _renamed(_columns(record, origin), names, origin)
            chosen = chosen or detect_format(renamed, origin, names)
            row = parse(renamed, origin, chosen)
            _refuse_long(row)
            rows.append(row)
        except DataError as error:
            if bad is None:
                raise
            bad.append(error)
    return rows


def _refuse_long(row: Row) -> None:
    """Refuse a row whose tokens would take more than about half a GB of memory."""
    length = len(row.completion) + sum(len(turn.content) for turn in row.prompt)
    if length > _LONGEST:
        raise DataError(f"{row.origin}: the row has {length:,} characters; at most {_LONGEST:,} can be used: split it")


def _pairs(columns: Sequence[str]) -> dict[str, str]:
    """Name here -> name of the column."""
    names = dict(pair.split("=", 1) for pair in columns if "=" in pair)
    if len(names) != len(columns) or not all((*names, *names.values())):
        raise RecipeError(f"columns is {' '.join(columns)}, but must be pairs such as prompt=question")
    return names


def _renamed(record: Record, names: Mapping[str, str], origin: str) -> Record:
    """A record with columns under the names of its format."""
    if not names:
        return record
    for name, column in names.items():
        if column not in record:
            raise DataError(
                f"{origin}: the column {column!r} of --columns {name}={column} is missing (found: {_names(record)}); "
                "--columns takes siftune's name first, as in prompt=question, and applies to all files"
            )
    others = {column: value for column, value in record.items() if column not in names.values() and column not in names}
    return {**{name: record[column] for name, column in names.items()}, **others}


@contextmanager
def no_garbage() -> Iterator[None]:
    """Turn garbage collection off in a block that makes many small objects: it would take longer than making them."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _columns(record: Any, origin: str) -> Record:
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(
            f"{origin}: the row is {kind_of(record)}, but must be an object; if the file is one list of them, name "
            "it .json"
        )
    return record


def row_texts(rows: Iterable[Row]) -> Iterator[bytes]:
    """Yield the text of each row and its label turns as bytes, independent of its origin."""
    for row in rows:
        turns = [(turn.role, turn.content, turn.learned) for turn in row.prompt]
        yield json.dumps((turns, row.completion)).encode()


class Text(NamedTuple):
    """Text of a row; earlier turns of a conversation are part of the prompt, with their roles."""

    prompt: str
    completion: str


def text_of(row: Row) -> Text:
    """Text of a row.

    Example:
        >>> text_of(rows_from([{"prompt": "2 + 2?", "completion": "4"}])[0])
        Text(prompt='2 + 2?', completion='4')
    """
    if len(row.prompt) == 1 and row.prompt[0].role == "user":
        return Text(row.prompt[0].content, row.completion)
    return Text("\n".join(f"{turn.role}: {turn.content}" for turn in row.prompt), row.completion)


def detect_format(record: Record, origin: str, named: Collection[str] = ()) -> Format:
    """Detect the format from the columns of one row.

    Args:
        record: the row.
        origin: its place, for messages.
        named: columns that the user has named: the format has one of them, if any format has.

    Raises:
        DataError: the columns belong to no format.
    """
    own = {each: columns for each, columns in _REQUIRED.items() if {*columns, *_OPTIONAL.get(each, ())} & {*named}}
    formats = own or _REQUIRED
    for each, columns in formats.items():
        if all(column in record for column in columns):
            return each
    if "conversations" in record and "messages" in formats:
        return "messages"
    paired = {"chosen", "rejected"} <= {*record}
    for each, columns in formats.items():
        if columns[0] in record and not paired:  # an incomplete row: reading it names the column that is missing
            return each
    raise DataError(f"{origin}: the columns found ({_names(record)}) are no known format; {_advice(record)}")


def _advice(record: Record) -> str:
    """The option that reads a row of an unknown format."""
    if "chosen" in record and "rejected" in record:
        turns = isinstance(record["chosen"], list)
        if "prompt" in record and turns == isinstance(record["prompt"], list):
            best = "completion=chosen"
        else:  # a conversation beside a prompt as text repeats the prompt
            best = "messages=chosen" if turns else "text=chosen"
        return (
            f"preference pairs are for TRL's DPOTrainer with our callbacks; to sift or train on the chosen texts, give "
            f"--columns {best}"
        )
    texts = [name for name, value in record.items() if isinstance(value, str)]
    if len(texts) == 2 and all(re.fullmatch(r"\w{1,40}", str(name)) for name in texts):
        return f"give --columns prompt={texts[0]} completion={texts[1]}, or the columns of a format: {_SUPPORTED}"
    return f"name them with --columns prompt=NAME completion=NAME, or give the columns of a format: {_SUPPORTED}"


_UNREAD = ("system", "history", "tools", "functions")  # columns of LLaMA-Factory and others


def parse_row(record: Record, origin: str, format: Format) -> Row:
    """Read one dictionary as one row.

    Raises:
        DataError: a column is missing, empty or of the wrong type, or would belong to the prompt and is in no format of
            siftune; the message names `origin`.
    """
    row = _PARSERS[format](record, origin)
    _refuse_unread(record, origin, format)
    return row


def _refuse_unread(record: Record, origin: str, format: Format) -> None:
    """Refuse columns that belong to the prompt in other tools, and that no format has: answers may depend on them."""
    name = next((name for name in _UNREAD if isinstance(record.get(name), str | list) and record[name]), None)
    if name is not None and format != "text":
        raise DataError(
            f"{origin}: the column {name!r} would not reach the model; give the row as 'messages' with a turn for it, "
            "or rename the column"
        )


def parse_question(record: Record, origin: str, format: Format) -> Row:
    """Read one dictionary as a prompt to answer; completions are not read.

    Returns:
        A row with an empty completion. Its prompt is the column `prompt`, the conversation without the assistant's turn
        at its end, or instruction and input; a text is a turn of the user.

    Raises:
        DataError: as `parse_row`.
    """
    if format == "messages":
        column = _messages_in(record)
        turns = turns_of(record, column, origin)
        prompt = turns[:-1] if turns[-1].role == "assistant" else turns
        if not prompt:
            raise DataError(f"{origin}: {column!r} has no turn to answer; add the user's turn, or remove the row")
    elif format == "prompt" and isinstance(record.get("prompt"), list):
        prompt = turns_of(record, "prompt", origin)
    else:
        text = _instruction(record, origin) if format == "alpaca" else _text(record, format, origin)
        prompt = (Message("user", text),)
    _refuse_unread(record, origin, format)
    return Row(tuple(replace(turn, learned=False) for turn in prompt), "", origin)


def _parse_prompt(record: Record, origin: str) -> Row:
    prompt, completion = record.get("prompt"), record.get("completion")
    extra = _without(record, "prompt", "completion")
    if not isinstance(prompt, list):
        turn = Message("user", _text(record, "prompt", origin))
        return Row((turn,), _text(record, "completion", origin), origin, extra)
    before = tuple(replace(m, learned=False) for m in turns_of(record, "prompt", origin))
    if not isinstance(completion, list):
        return Row(before, _text(record, "completion", origin), origin, extra)
    return _conversation(before, turns_of(record, "completion", origin), "completion", origin, extra)


def _parse_messages(record: Record, origin: str) -> Row:
    column = _messages_in(record)
    return _conversation((), turns_of(record, column, origin), column, origin, _without(record, column))


def _messages_in(record: Record) -> str:
    """The column of the conversation."""
    return "messages" if "messages" in record else "conversations"


def _parse_alpaca(record: Record, origin: str) -> Row:
    turn = Message("user", _instruction(record, origin))
    extra = _without(record, "instruction", "input", "output")
    return Row((turn,), _text(record, "output", origin), origin, extra)


def _instruction(record: Record, origin: str) -> str:
    parts = [_text(record, "instruction", origin)]
    given = record.get("input")
    if given is not None and (not isinstance(given, str) or given.strip()):
        parts.append(_text(record, "input", origin))
    return "\n\n".join(parts)


def _parse_text(record: Record, origin: str) -> Row:
    return Row((), _text(record, "text", origin), origin, _without(record, "text"))


_PARSERS: dict[Format, Callable[[Record, str], Row]] = {
    "prompt": _parse_prompt,
    "messages": _parse_messages,
    "alpaca": _parse_alpaca,
    "text": _parse_text,
}


def _conversation(
    before: tuple[Message, ...], turns: tuple[Message, ...], column: str, origin: str, extra: Record
) -> Row:
    """Make a row of a conversation, without turns of the user after the last one of the assistant.

    Args:
        before: turns of another column that come first.
        turns: turns of `column`, with the completion.
        column: name of the column, for messages.
        origin: place of the row.
        extra: other columns.
    """
    if all(turn.role != "assistant" for turn in turns):
        raise DataError(
            f"{origin}: {column!r} has no turn of the assistant, so the row has no completion; add one, or remove "
            "the row"
        )
    end = max(number for number, turn in enumerate(turns, 1) if turn.role != "user")
    *earlier, last = (*before, *turns[:end])
    if last.role != "assistant":
        raise DataError(
            f"{origin}: {column!r} ends with a turn of the role {last.role!r}, so the row has no completion; "
            "end it with the assistant's turn, or remove the row"
        )
    if not last.learned:
        raise DataError(
            f"{origin}: the last turn of {column!r} has the weight 0, so the row has no completion; end the row with a "
            "turn to learn, or remove it"
        )
    if not earlier:
        raise DataError(
            f"{origin}: {column!r} has only the assistant's turn and nothing before it; add the user's turn, "
            "or give the row as 'text'"
        )
    return Row(tuple(earlier), last.content, origin, extra, unanswered=len(turns) - end)


def _weight(value: Any, origin: str) -> float:
    """Read a weight; CSV gives all numbers as text, and leaves a field empty."""
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise DataError(
            f"{origin}: 'weight' is {value!r}; give a number from 0, the row's weight in training, or rename the column"
        )
    return weight


def _names(record: Record) -> str:
    """The columns of a record, for messages."""
    return one_line(", ".join(map(str, record))) or "none"


def _text(record: Record, column: str, origin: str) -> str:
    """Read a column that must hold a string that is not empty."""
    if column not in record:
        raise DataError(
            f"{origin}: the column {column!r} is missing (found: {_names(record)}); name the column that has it with "
            f"--columns {column}=NAME, or remove the row"
        )
    return string_of(record[column], f"{origin}: {column!r}", may_be_empty=False)


def _without(record: Record, *columns: str) -> Record:
    return {column: value for column, value in record.items() if column not in columns}
