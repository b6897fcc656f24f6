"""Values as strict JSON can hold them."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

_BEYOND = 1e100


def jsonable(value: Any, digits: int | None = None) -> Any:
    """Bring a value into the types of JSON, at any depth.

    Dataclasses become dictionaries; tensors, arrays and their scalars lists and Python's numbers; NaN and infinity,
    which JSON does not know, None; whatever else, such as paths, text.

    Args:
        value: The value.
        digits: Significant digits that floats are rounded to; None keeps all.

    Example:
        >>> from pathlib import Path
        >>> jsonable({"loss": float("nan"), "scores": (0.123456, 1), "out": Path("run")}, digits=4)
        {'loss': None, 'scores': [0.1235, 1], 'out': 'run'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name), digits) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(part, digits) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return jsonable(value.tolist(), digits)
    if isinstance(value, list | tuple | set):
        return [jsonable(part, digits) for part in value]
    if isinstance(value, float):
        return _number(value, digits)
    return value if isinstance(value, str | int | None) else str(value)


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


def _number(value: float, digits: int | None) -> float | None:
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")


def parsed(text: str) -> Any:
    """Parse JSON of whatever origin.

    Raises:
        ValueError: It is none, or nested so deeply that Python gives up.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
