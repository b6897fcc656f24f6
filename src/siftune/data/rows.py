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
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from siftune.base.errors import DataError, RecipeError
from siftune.base.text import one_line

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
_SUPPORTED = "prompt + completion; messages or conversations; instruction (+ input) + output; text"
_SHAREGPT = {"human": "user", "gpt": "assistant"}  # other roles are the same


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: speaker, as in the chat template: system, user, assistant, tool.
        content: text.
        learned: whether its tokens are label tokens; those of the last turn of a row always are.
    """

    role: str
    content: str
    learned: bool = False


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
    """

    prompt: tuple[Message, ...]
    completion: str
    origin: str
    extra: Record = field(default_factory=dict)
    of_target: bool = False

    @property
    def weight(self) -> float:
        """Weight of the row in training: its column `weight`, by default 1.

        Raises:
            DataError: It is no finite number from 0.
        """
        return _weight(self.extra.get(WEIGHT), self.origin)


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
    records: Iterable[tuple[str, Any]], columns: Sequence[str] = (), bad: list[DataError] | None = None
) -> list[Row]:
    """Turn pairs of an origin and a record into rows. The columns of the first row determine the format.

    Args:
        records: origin and record; a `DataError` if it cannot be read.
        columns: pairs such as `prompt=question`: the name here, and the name of the column. The format is then one
            that has the former.
        bad: list for the errors of bad rows, which are then left out.

    Raises:
        DataError, RecipeError: as `rows_from`.
    """
    names = _pairs(columns)
    chosen: Format | None = None
    rows: list[Row] = []
    for origin, record in records:
        try:
            renamed = _renamed(_columns(record, origin), names, origin)
            chosen = chosen or detect_format(renamed, origin, names)
            rows.append(parse_row(renamed, origin, chosen))
        except DataError as error:
            if bad is None:
                raise
            bad.append(error)
    return rows


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
                "--columns has the name of the format first, such as prompt=question, and holds for all files."
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
            f"{origin}: the row is {kind_of(record)}, but must be an object of columns; name a file with a list of "
            "them .json."
        )
    return record


def row_texts(rows: Iterable[Row]) -> Iterator[bytes]:
    """Yield the text of each row and its label turns as bytes, independent of its origin."""
    for row in rows:
        turns = [(turn.role, turn.content, turn.learned) for turn in row.prompt]
        yield json.dumps((turns, row.completion)).encode()


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
    raise DataError(f"{origin}: the columns found ({_names(record)}) are no known format; {_advice(record)}.")


def _advice(record: Record) -> str:
    """The option that reads a row of an unknown format."""
    if "chosen" in record and "rejected" in record:
        best = "messages=chosen" if isinstance(record["chosen"], list) else "text=chosen"
        best = "completion=chosen" if "prompt" in record else best
        advice = "preference pairs are for TRL's DPOTrainer with our callbacks"
        return f"{advice}; or train on the better texts with --columns {best}"
    texts = [name for name, value in record.items() if isinstance(value, str)]
    if len(texts) == 2 and all(re.fullmatch(r"\w{1,40}", str(name)) for name in texts):
        return f"give --columns prompt={texts[0]} completion={texts[1]}, or the columns of a format: {_SUPPORTED}"
    return f"name them with --columns prompt=NAME completion=NAME, or give the columns of a format: {_SUPPORTED}"


def parse_row(record: Record, origin: str, format: Format) -> Row:
    """Read one dictionary as one row.

    Raises:
        DataError: a column is missing, empty or of the wrong type; the message names `origin`.
    """
    return _PARSERS[format](record, origin)


def _parse_prompt(record: Record, origin: str) -> Row:
    prompt, completion = record.get("prompt"), record.get("completion")
    extra = _without(record, "prompt", "completion")
    if not isinstance(prompt, list):
        turn = Message("user", _text(record, "prompt", origin))
        return Row((turn,), _text(record, "completion", origin), origin, extra)
    before = tuple(replace(m, learned=False) for m in _turns(prompt, "prompt", origin))
    if not isinstance(completion, list):
        return Row(before, _text(record, "completion", origin), origin, extra)
    return _conversation(before + _turns(completion, "completion", origin), "completion", origin, extra)


def _parse_messages(record: Record, origin: str) -> Row:
    column = "messages" if "messages" in record else "conversations"
    turns = _turns(record.get(column), column, origin)
    return _conversation(turns, column, origin, _without(record, column))


def _parse_alpaca(record: Record, origin: str) -> Row:
    parts = [_text(record, "instruction", origin)]
    given = record.get("input")
    if given is not None and (not isinstance(given, str) or given.strip()):
        parts.append(_text(record, "input", origin))
    turn = Message("user", "\n\n".join(parts))
    extra = _without(record, "instruction", "input", "output")
    return Row((turn,), _text(record, "output", origin), origin, extra)


def _parse_text(record: Record, origin: str) -> Row:
    return Row((), _text(record, "text", origin), origin, _without(record, "text"))


_PARSERS: dict[Format, Callable[[Record, str], Row]] = {
    "prompt": _parse_prompt,
    "messages": _parse_messages,
    "alpaca": _parse_alpaca,
    "text": _parse_text,
}


def _conversation(turns: tuple[Message, ...], column: str, origin: str, extra: Record) -> Row:
    """Make a row of a conversation, which must end with the assistant's turn."""
    if extra.get("tools"):
        raise DataError(
            f"{origin}: the column 'tools' is not supported; write the tools into a system turn, and remove the column."
        )
    *before, last = turns
    if last.role == "assistant" and not last.learned:
        raise DataError(
            f"{origin}: the last turn of {column!r} has the weight 0, so the row has no completion; end the row with a "
            "turn to learn, or remove it."
        )
    if last.role != "assistant":
        raise DataError(
            f"{origin}: {column!r} ends with a turn of the role {last.role!r}, so the row has no completion; "
            "end it with the assistant's turn, or remove the row."
        )
    if not before:
        raise DataError(
            f"{origin}: {column!r} has only the assistant's turn and nothing before it; add the user's turn, "
            "or give the row as 'text'."
        )
    return Row(tuple(before), last.content, origin, extra)


def _turns(value: Any, column: str, origin: str) -> tuple[Message, ...]:
    """Read a list of `{role, content}`; the assistant's turns are marked as learned."""
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else kind_of(value)
        raise DataError(f"{origin}: {column!r} is {kind}; give a list of {{role, content}} objects.")
    return tuple(_turn(turn, f"{origin}: turn {i} of {column!r}") for i, turn in enumerate(value, 1))


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {kind_of(turn)}; give an object with 'role' and 'content'.")
    if "from" in turn and "role" not in turn:
        role = turn["from"]
        turn = {"role": _SHAREGPT.get(role, role) if isinstance(role, str) else role, "content": turn.get("value")}
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} has no role (found {kind_of(role)}); use system, user, assistant or tool.")
    if turn.get("tool_calls"):
        raise DataError(f"{where} has tool_calls, which are not supported; write them into 'content'.")
    assistant, weight = role == "assistant", turn.get(WEIGHT)
    if weight not in (None, 0, 1):
        raise DataError(f"{where} has the weight {weight!r}; give 0 or 1, or remove it.")
    content = _string(turn.get("content"), f"{where}: 'content'", may_be_empty=not assistant)
    return Message(role, content, learned=assistant and weight != 0)


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
            f"{origin}: 'weight' is {value!r}; give a number from 0, the row's weight in training, or "
            "rename the column."
        )
    return weight


def _names(record: Record) -> str:
    """The columns of a record, for messages."""
    return one_line(", ".join(map(str, record))) or "none"


def _text(record: Record, column: str, origin: str) -> str:
    """Read a column that must hold a string that is not empty."""
    if column not in record:
        raise DataError(
            f"{origin}: the column {column!r} is missing (found: {_names(record)}); add it or remove the row."
        )
    return _string(record[column], f"{origin}: {column!r}", may_be_empty=False)


def _string(value: Any, where: str, may_be_empty: bool) -> str:
    if value is None and not may_be_empty:
        raise DataError(f"{where} is empty (null); fill it in or remove the row.")
    if not isinstance(value, str):
        raise DataError(f"{where} is {kind_of(value)}; give a string.")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where} is empty; fill it in or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # no tokenizer takes half of a surrogate pair
        raise DataError(
            f"{where} holds an unpaired surrogate ({value[error.start]!r}) at character {error.start}; "
            "write the whole character or remove it."
        ) from None
    return value


def kind_of(value: Any) -> str:
    """Name the JSON type of a value, with its article."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "missing or null"}
    return names.get(type(value), f"of the type {type(value).__name__}")


def _without(record: Record, *columns: str) -> Record:
    return {column: value for column, value in record.items() if column not in columns}
