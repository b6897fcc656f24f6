"""What rows say, in words, and what tells them from others."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from siftune.data.rows import Row, said


class Text(NamedTuple):
    """What a row says; turns of a conversation before the completion are in the prompt, with their roles."""

    prompt: str
    completion: str


def text_of(row: Row) -> Text:
    """What a row says.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> text_of(rows_from([{"prompt": "2 + 2?", "completion": "4"}])[0])
        Text(prompt='2 + 2?', completion='4')
    """
    if len(row.prompt) == 1 and row.prompt[0].role == "user":
        return Text(row.prompt[0].content, row.completion)
    return Text("\n".join(f"{turn.role}: {turn.content}" for turn in row.prompt), row.completion)


def digest_of(rows: Sequence[Row]) -> str:
    """What tells rows from others, wherever they stand: a hash of what they say, in their order."""
    digest = hashlib.sha256()
    for each in said(rows):
        digest.update(each)
    return digest.hexdigest()
