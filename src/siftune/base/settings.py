"""Settings that are declared once: a dataclass field is type, default, help, range and source of an option.

A class of settings gives each field a type, a default, and under it a line of help. What else is known of it stands
in the type: its `Range`, and `OURS` where neither the method's paper nor its code has it or its default.

    @dataclass
    class ISTSettings(Settings):
        group = "ist"

        active: Annotated[float, SHARE] = 0.25
        \"\"\"Share of the layers that train in a step.\"\"\"

Constructors, recipes, flags, their help and the documentation come from that. Nothing here imports torch, so that
`siftune --help` stays quick.
"""

import ast
import difflib
import inspect
import itertools
import math
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from siftune.base.errors import RecipeError

S = TypeVar("S", bound="Settings")

OURS = "ours"  # in a field's type: a choice of this project, not the paper's

# names that other trainers use, so that the hint is right where spelling alone would not find it
ELSEWHERE = {
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "checkpointing",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "max_seq_length": "max_length",
    "max_steps": "steps",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "batch_size",
    "r": "rank",
    "target_modules": "targets",
    "train_file": "train",
    "warmup_ratio": "warmup",
}


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be.

    Attributes:
        valid: Whether a number is one of them.
        words: Which they are, to follow "must be".
    """

    valid: Callable[[float], bool]
    words: str


COUNT = Range(lambda v: v >= 1, "1 or more")
SHARE = Range(lambda v: 0 < v <= 1, "above 0 and at most 1")
BELOW_ONE = Range(lambda v: 0 <= v < 1, "from 0 to below 1")
POSITIVE = Range(lambda v: v > 0, "above 0")
CHANCE = Range(lambda v: 0 < v < 1, "above 0 and below 1")
PROMISE = Range(lambda v: 0 < v <= 100, "above 0 and at most 100, beyond which it promises nothing")
NOT_NEGATIVE = Range(lambda v: v >= 0, "0 or more")
WARM_UP = Range(
    lambda v: v >= 0 if isinstance(v, int) else 0 <= v < 1, "a whole number of steps, or a fraction from 0 to below 1"
)
COUNT_OR_SHARE = Range(
    lambda v: v >= 1 if isinstance(v, int) else 0 < v <= 1,
    "a whole number from 1, or a share above 0 and at most 1.0",
)


@dataclass
class Settings:
    """Base of a method's settings; checked when they are made.

    Raises:
        RecipeError: When a setting is out of its range.
    """

    group: ClassVar[str]
    """Name of the method's settings in recipes and flags."""

    with_target: ClassVar[Mapping[str, Any]] = {}
    """Defaults where few rows of a target are given: what a recipe's `target` puts in their place."""

    def __post_init__(self) -> None:
        """Check every field; a list is as good as a tuple, such as a checkpoint's JSON holds."""
        for name in self.names(type(self)):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Check every field that is not at its default, and what fields say about each other; see `_faults`."""
        owner = _owner(type(self))
        changed = [field.name for field in fields(owner) if getattr(self, field.name) != field.default]
        check_fields(self, changed, f"{self.group}.")
        for fault, sentence in self._faults() if changed else ():
            if fault:
                raise RecipeError(sentence)

    def _faults(self) -> Iterable[tuple[bool, str]]:
        """Pairs of what is wrong with fields taken together, and the sentence that says so."""
        return ()

    @staticmethod
    def names(kind: type["Settings"]) -> list[str]:
        """Names of a class's settings; what a callback adds to them is none."""
        return [field.name for field in fields(_owner(kind))]

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, without what a callback adds to them."""
        return {name: getattr(self, name) for name in self.names(type(self))}


def _owner(kind: type[Settings]) -> type[Settings]:
    """The class that names the group: a callback derives from it."""
    return next(base for base in kind.__mro__ if base.__dict__.get("group"))


def check_fields(values: Any, names: Iterable[str], prefix: str = "") -> None:
    """Check types and ranges of a dataclass's fields.

    Args:
        values: An instance.
        names: The fields to look at.
        prefix: What messages put in front of a field's name; after "--" it is written as a flag.

    Raises:
        RecipeError: With one sentence on the first value that cannot be used.
    """
    hints = get_type_hints(type(values), include_extras=True)
    for name in names:
        value, (hint, *marks) = getattr(values, name), _unwrapped(hints[name])
        shown = f"--{name.replace('_', '-')}" if prefix == "--" else f"{prefix}{name}"
        if not fits(value, hint):
            raise RecipeError(f"{shown} is {value!r}, but must be {in_words(hint)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise RecipeError(f"{shown} is {value}, but must be a finite number")
        for mark in marks:
            if isinstance(mark, Range) and not mark.valid(value):
                raise RecipeError(f"{shown} is {value}, but must be {mark.words}")


def marks_of(kind: type, name: str) -> tuple[Any, ...]:
    """What the type of a field says besides the type: `Range`, `OURS`."""
    return tuple(_unwrapped(get_type_hints(kind, include_extras=True)[name])[1:])


def _unwrapped(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Annotated else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; a whole number passes for a number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, arguments[0])
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(part, arguments[0]) for part in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint or (isinstance(hint, type) and hint not in (int, bool) and isinstance(value, hint))


def in_words(hint: Any) -> str:
    """Say what values the type of a field admits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return in_words(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in arguments)
    if origin is tuple:
        return "a list of names" if arguments[0] is str else f"a list, each {in_words(arguments[0])}"
    words = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
    return "nothing" if hint is type(None) else words.get(hint, getattr(hint, "__name__", str(hint)))


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `word` most likely stands for, or None.

    Names with a dot are those of a method's settings: `select` stands for `gast.select` where no other group has it.
    """
    names = list(names)
    word = word.replace("-", "_").lower()
    if ELSEWHERE.get(word) in names:
        return ELSEWHERE[word]
    grouped = [name for name in names if name.endswith(f".{word}")]
    known = [*names, *(other for other, name in ELSEWHERE.items() if name in names)]
    close = grouped or [ELSEWHERE.get(one, one) for one in difflib.get_close_matches(word, known, n=1)]
    return " or ".join(close) if close else None


def help_of(kind: type) -> dict[str, str]:
    """The line of help under each field of a class; empty where its source is not at hand."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return {}
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def documented(kind: type[S]) -> type[S]:
    """Put the help of the settings that a callback takes over into its docstring, at the line `Args:`."""
    lines = [f"        {name}: {line}" for name, line in help_of(_owner(kind)).items()]
    if kind.__doc__ and lines:
        kind.__doc__ = kind.__doc__.replace("    Args:\n", "    Args:\n" + "\n".join(lines) + "\n", 1)
    return kind
