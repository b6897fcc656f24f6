"""Turns of conversations, and the checks of values in rows.

Only `role` and `content` of a turn reach the chat template. Columns and fields of tools are therefore refused; a turn
of the role `tool` is a turn like any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from siftune.base.errors import DataError

_SHAREGPT = {"human": "user", "gpt": "assistant"}  # other roles are the same
_TOOLS = ("tools", "functions")  # columns of tools, in OpenAI's format and its older form
_CALLS = ("tool_calls", "function_call")  # the same in a turn of the assistant


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


def turns_of(record: Mapping[str, Any], column: str, origin: str) -> tuple[Message, ...]:
    """Read a column with a list of `{role, content}`; the assistant's turns are marked as learned.

    Raises:
        DataError: it is no such list, or there are tools.
    """
    if tools := next((name for name in _TOOLS if record.get(name)), None):
        raise DataError(
            f"{origin}: the column {tools!r} is not supported, because only role and content of turns reach the chat "
            "template; write the tools into a system turn, and remove the column"
        )
    value = record.get(column)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else kind_of(value)
        raise DataError(f"{origin}: {column!r} is {kind}; give a list of {{role, content}} objects")
    return tuple(_turn(turn, f"{origin}: turn {i} of {column!r}") for i, turn in enumerate(value, 1))


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {kind_of(turn)}; give an object with 'role' and 'content'")
    if "from" in turn and "role" not in turn:
        role = turn["from"]
        role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
        turn = {**turn, "role": role, "content": turn.get("value")}
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} has no role (found {kind_of(role)}); use system, user, assistant or tool")
    if calls := next((name for name in _CALLS if turn.get(name)), None):
        raise DataError(
            f"{where} has {calls}, which is not supported, because only role and content reach the chat template; "
            "write the calls into 'content', in the form that your model uses, or remove the row"
        )
    assistant, weight = role == "assistant", turn.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{where} has the weight {weight!r}; give 0 or 1, or remove it")
    content = string_of(turn.get("content"), f"{where}: 'content'", may_be_empty=not assistant)
    return Message(role, content, learned=assistant and weight != 0)


def string_of(value: Any, where: str, may_be_empty: bool) -> str:
    """Check that a value is a string.

    Args:
        value: the value.
        where: its place, for messages.
        may_be_empty: whether it may be empty or blank.

    Raises:
        DataError: it is no string, or holds what no tokenizer takes.
    """
    if value is None and not may_be_empty:
        raise DataError(f"{where} is empty (null); fill it in or remove the row")
    if not isinstance(value, str):
        raise DataError(f"{where} is {kind_of(value)}; give a string")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where} is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # no tokenizer takes half of a surrogate pair
        raise DataError(
            f"{where} holds an unpaired surrogate ({value[error.start]!r}) at character {error.start}; "
            "write the whole character or remove it"
        ) from None
    return value


def kind_of(value: Any) -> str:
    """Name the JSON type of a value, with its article."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "missing or null"}
    return names.get(type(value), f"of the type {type(value).__name__}")
