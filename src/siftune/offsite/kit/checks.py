"""Checks of single values that a stranger wrote; each is given the value and where it stands, for its sentence.

The child that tries a tokenizer imports this file, so that it imports neither torch nor transformers.
"""

from collections.abc import Callable
from typing import Any

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import as_int, as_list, shown

Check = Callable[[Any, str], object]

MAX_ITEMS = 1024  # in a list


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""
    return lambda value, where: as_int(value, where, low, high)


def number(low: float, high: float) -> Check:
    """A number from `low` to `high`."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise KitError(f"{where} is {shown(value)}, not a number from {low:g} to {high:g}")

    return check


def one_of(*words: str) -> Check:
    """One of some words."""

    def check(value: Any, where: str) -> None:
        if value not in words:
            raise KitError(f"{where} is {shown(value)}; known are {', '.join(words)}")

    return check


def null_or(check: Check) -> Check:
    """Null, or what another check lets through."""
    return lambda value, where: None if value is None else check(value, where)


def list_of(check: Check) -> Check:
    """A list of at least one item, each of which another check lets through."""

    def each(value: Any, where: str) -> None:
        if not as_list(value, where, MAX_ITEMS):
            raise KitError(f"{where} is empty")
        for item in value:
            check(item, where)

    return each


def truth(value: Any, where: str) -> None:
    """True or false; 1 and 0 are neither."""
    if not isinstance(value, bool):
        raise KitError(f"{where} is {shown(value)}, not true or false")
