"""Numbers as text."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from siftune.base import text as words

MINUS = "−"
NBSP = "\u00a0"  # holds a number and its unit together


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds, three to six of them.

    Example:
        >>> ticks(0, 120), ticks(0.33, 1.73)
        ([0.0, 50.0, 100.0], [0.5, 1.0, 1.5])
    """
    if not high - low > 1e-300:  # nothing to divide
        return [low]
    power = 10.0 ** math.floor(math.log10(high - low))
    for step in (power * part for part in (5, 2, 1, 0.5, 0.2)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first >= 2:
            break
    return [number * step for number in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """How the values on an axis are written: all with the same number of digits."""
    step = min((abs(b - a) for a, b in pairwise(values)), default=abs(values[0]) if values else 0)
    largest = max(map(abs, values), default=0)
    if 0 < step <= largest < 2e-3:  # one digit, or as many more as tell the values apart
        digits = max(0, math.floor(math.log10(largest)) - math.floor(math.log10(step * 1.001)))
        return [
            _signed("0" if abs(value) < step / 2 else f"{value:.{digits}e}".replace("e-0", "e-")) for value in values
        ]
    digits = next((count for count in range(9) if abs(round(step, count) - step) < step / 1000), 9) if step else 0
    return [_signed(f"{value:,.{digits}f}") for value in values]


def percent_texts(values: Sequence[float]) -> list[str]:
    """How shares on an axis are written."""
    return [f"{text}{NBSP}%" for text in tick_texts([100 * value for value in values])]


def short(value: float | None, digits: int = 3) -> str:
    """A number to a few significant digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return _signed(f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e"))
    decimals = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _signed(f"{value:,.{decimals}f}")


def percent(value: float | None) -> str:
    """A share between 0 and 1, in per cent."""
    return "–" if value is None or not math.isfinite(value) else _signed(f"{100 * value:.1f}{NBSP}%")


def points(value: float | None) -> str:
    """A difference of shares in points, with its sign; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else _signed(f"{100 * value:+.1f}")


def duration(seconds: float | None) -> str:
    """A time; a dash where there is none."""
    return "–" if seconds is None or not math.isfinite(seconds) else words.duration(seconds)


def memory(megabytes: float | None) -> str:
    """A size given in 10⁶ bytes."""
    if megabytes is None or not math.isfinite(megabytes):
        return "–"
    return f"{megabytes:,.0f} MB" if megabytes < 10_000 else f"{megabytes / 1000:,.1f} GB"


def cut(text: str, most: int) -> str:
    """A text cut to a number of characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|parquet|txt)$")


def data_name(data: str) -> str:
    """Held-out rows as text: files without their folders, hub ids as is.

    Example:
        >>> data_name("google/boolq@validation"), data_name("5 % of /a/pool.jsonl and b/more.csv")
        ('google/boolq@validation', '5 % of pool.jsonl and more.csv')
    """
    share, of, files = data.rpartition(" % of ")
    is_file = [bool(_FILE.search(name)) or Path(name).is_absolute() for name in files.split(" and ")]
    names = [Path(name).name if file else name for name, file in zip(files.split(" and "), is_file, strict=True)]
    return share + of + " and ".join(names)


def short_places(places: Sequence[str]) -> dict[str, str]:
    """Places of rows by the names of their files, such as pool.jsonl:17, that distinguish the files.

    Example:
        >>> short_places(["data/pool.jsonl:17"])
        {'data/pool.jsonl:17': 'pool.jsonl:17'}
    """
    files = {place: words.file_of(place) for place in places}
    names = dict(zip(files.values(), words.short_names([Path(file) for file in files.values()]), strict=False))
    return {place: names[file] + place[len(file) :] for place, file in files.items()}


def listed(parts: Sequence[str]) -> str:
    """Parts with commas, and a last "and".

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _signed(text: str) -> str:
    return text.replace("-", MINUS, 1) if text.startswith("-") else text
