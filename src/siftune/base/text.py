"""Text of messages, and values as strict JSON can hold them."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

_BEYOND = 1e100


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    Example:
        >>> counted(1, "row"), counted(3000, "row")
        ('1 row', '3,000 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time in seconds, or in the two units that suit it.

    Example:
        >>> duration(0.2), duration(42), duration(200), duration(7380)
        ('0.2 s', '42 s', '3 min 20 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s" if whole else f"{seconds:.1g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def one_line(text: str, longest: int = 200) -> str:
    r"""Words of others for a message of ours: on one line, cut short, and without characters that do not show.

    Example:
        >>> one_line("no\nsuch \x00 thing", 10)
        'no such...'
    """
    line = " ".join(text.split())
    clean = "".join(c if c.isprintable() else "?" for c in line)
    return clean if len(clean) <= longest else clean[: longest - 3] + "..."


def visible(text: str) -> str:
    r"""A text in which nothing moves the cursor or changes colours, but for new lines: what does is written out.

    Example:
        >>> print(visible("red \x1b[31mrot"))
        red \x1b[31mrot
    """
    return "".join(
        char
        if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of files or folders, with as many of the folders above as are needed to distinguish them.

    Example:
        >>> short_names([Path("a/run"), Path("b/run"), Path("b/run")])
        ['a/run', 'b/run', 'b/run']
    """
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


_POSITION = re.compile(r":\d+$| row \d+$")


def file_of(place: str) -> str:
    """The file or data set that a row's place names.

    Example:
        >>> file_of("data/pool.jsonl:17"), file_of("pool.parquet row 3")
        ('data/pool.jsonl', 'pool.parquet')
    """
    return _POSITION.sub("", place)


def path_and_split(source: str) -> tuple[str, str]:
    """Separate the split from the name of a file or folder that exists, such as `saved@test`.

    Returns:
        The name, and `@test`; or the source as it is and nothing, if no split is named or it is a hub id.
    """
    name, at, split = source.rpartition("@")
    if at and not os.path.exists(os.path.expanduser(source)) and os.path.exists(os.path.expanduser(name)):
        return name, at + split
    return source, ""


def file_named(name: str, files: Sequence[str]) -> str | None:
    """The file that stands for one that may have been in another folder: of the same name, with most folders in common.

    Args:
        name: The file, or data set.
        files: Files to choose from.

    Returns:
        One of `files`; None if none has the name.

    Example:
        >>> file_named("/old/b/rows.jsonl", ["new/a/rows.jsonl", "new/b/rows.jsonl", "new/b/few.jsonl"])
        'new/b/rows.jsonl'
    """

    def common(file: str) -> int:
        pairs = zip(reversed(Path(file).parts), reversed(Path(name).parts), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    nearest = max(files, key=common, default=None)
    return nearest if nearest is not None and common(nearest) else None


def jsonable(value: Any) -> Any:
    """Bring a value into the types of JSON, at any depth.

    Dataclasses become dictionaries; tensors, arrays and their scalars lists and Python's numbers; NaN and infinity,
    which JSON does not know, None; whatever else, such as paths, text.

    Example:
        >>> from pathlib import Path
        >>> jsonable({"loss": float("nan"), "scores": (0.5, 1), "out": Path("run")})
        {'loss': None, 'scores': [0.5, 1], 'out': 'run'}
    """
    return to_jsonable_python(value, inf_nan_mode="null", fallback=_plain)


def _plain(value: Any) -> Any:
    """Tensors, arrays and their scalars as lists and numbers, mappings as dictionaries; the rest as text."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def finite(value: Any) -> float:
    """A number from untrusted JSON that can be drawn.

    Raises:
        ValueError, TypeError: It is none, not finite, or beyond all measure.

    Example:
        >>> finite(3)
        3.0
    """
    number = float(value)
    if not abs(number) < _BEYOND:
        raise ValueError(f"{value} is no figure")
    return number


def inert(text: str) -> str:
    """A text for a field of a CSV file, with an apostrophe in front if a spreadsheet would compute it."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")  # csv puts no quotes around a lone \r before Python 3.13
    return f"'{lines}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else lines
