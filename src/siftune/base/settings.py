"""Settings: types, ranges, defaults and help of every option, in the fields of a dataclass that pydantic validates.

    @dataclass(config=CONFIG)
    class ISTSettings(Settings):
        group = "ist"

        active: Share = 0.25
        \"\"\"Share of the layers to train in a step.\"\"\"

The constructor, recipes, flags and their help use these fields. Nothing here imports torch, so `siftune --help` stays
fast.
"""

import difflib
import inspect
import textwrap
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import AllowInfNan, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from siftune.base.errors import RecipeError
from siftune.base.text import counted

T = TypeVar("T")
S = TypeVar("S", bound="Settings")

CONFIG = ConfigDict(
    allow_inf_nan=False, arbitrary_types_allowed=True, extra="forbid", strict=True, use_attribute_docstrings=True
)

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
AtLeastTwo = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Chance = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
CountOrShare = Count | Share
Steps = CountOrZero | BelowOne  # a number of steps, or a fraction of all steps
Columns = tuple[Annotated[str, Field(pattern=r"^[^=]+=[^=]+$", description="pairs such as prompt=question")], ...]
Template = Literal["auto", "chat", "none"] | Path  # a path: a file with a chat template

# other names, most of them in other trainers -> name here, for hints that spelling alone does not give
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
    "pool": "train",
    "r": "rank",
    "rows": "limit",
    "target_modules": "targets",
    "threshold": "max_score",
    "train_file": "train",
    "warmup_ratio": "warmup",
}


class SettingError(RecipeError):
    """A value that its field does not allow, or a required field without a value.

    Attributes:
        field: Name of the field, behind the name of its group and a dot if it has one.
        valid: The allowed values, to follow "must be".
        missing: Names of all required fields without a value.
    """

    def __init__(self, field: str, value: Any, valid: str, missing: tuple[str, ...] = ()) -> None:
        super().__init__(f"{field} must be given" if missing else f"{field} is {value!r}, but must be {valid}")
        self.field, self.valid, self.missing = field, valid, missing


@dataclass(config=CONFIG)
class Validated:
    """Base of all settings and options: a value that its field does not allow raises `SettingError`."""

    group: ClassVar[str] = ""
    """Name of the group in recipes and flags; empty for options without a group."""

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(values)
        except ValidationError as error:
            raise cls._refusal(values, error) from None

    @classmethod
    def _refusal(cls, values: Any, error: ValidationError) -> RecipeError:
        problem, known = error.errors()[0], list(types_of(cls))
        place = problem["loc"][0]  # of a positional argument, its number
        if problem["type"] == "unexpected_positional_argument":
            takes, given = counted(len(known), "setting"), counted(len(values.args), "value")
            return RecipeError(f"{cls.__name__} has {takes}, but got {given}")
        name = known[place] if isinstance(place, int) else place
        prefix = f"{cls.group}." if cls.group else ""
        if problem["type"] == "unexpected_keyword_argument":
            close = nearest(name, types_of(cls))
            return RecipeError(f"unknown setting {prefix}{name}" + (f"; did you mean {close}?" if close else ""))
        missing = tuple(str(each["loc"][0]) for each in error.errors() if each["type"] == "missing")
        arguments = dict(zip(types_of(cls), values.args, strict=False)) if isinstance(values, ArgsKwargs) else {}
        arguments |= (values.kwargs or {}) if isinstance(values, ArgsKwargs) else {}
        return SettingError(f"{prefix}{name}", arguments.get(name), described(types_of(cls)[name]), missing)


@dataclass(config=CONFIG)
class Settings(Validated):
    """Base of a method's settings, which are checked when they are made.

    Raises:
        RecipeError: A setting is out of its range, or settings contradict each other.
    """

    with_target: ClassVar[Mapping[str, Any]] = {}
    """Defaults in a run with a target."""

    def __post_init__(self) -> None:
        """Validate a callback's settings, whose constructor is not pydantic's, and check all settings together."""
        owner = _owner(type(self))
        if owner is not type(self):
            values = {
                name: tuple(value) if isinstance(value, list) else value for name, value in self.to_dict().items()
            }
            for name, value in vars(owner(**values)).items():
                setattr(self, name, value)
        for is_wrong, sentence in self._faults():
            if is_wrong:
                raise RecipeError(sentence)

    def _faults(self) -> Iterable[tuple[bool, str]]:
        """Contradictions between settings: whether there is one, and the sentence about it."""
        return ()

    @staticmethod
    def names(kind: type["Settings"]) -> list[str]:
        """Names of a class's settings, without the fields that a callback adds."""
        return [field.name for field in fields(_owner(kind))]

    def to_dict(self) -> dict[str, Any]:
        """Settings by name, without the fields that a callback adds."""
        return {name: getattr(self, name) for name in self.names(type(self))}


def _owner(kind: type[Settings]) -> type[Settings]:
    """The class that defines the settings: a callback derives from it."""
    return next(base for base in kind.__mro__ if base.__dict__.get("group"))


def types_of(kind: type) -> dict[str, Any]:
    """The fields of a dataclass and their types, ranges included."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def help_of(kind: type) -> dict[str, str]:
    """The help of every field of a class, on one line each."""
    lines: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        described_here = base.__dict__.get("__pydantic_fields__", {})
        lines |= {
            name: " ".join(field.description.split()) for name, field in described_here.items() if field.description
        }
    return lines


def leaves(hint: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The alternatives of a type, each with its metadata: `int | None` has two."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        return [(leaf, (*own, *marks)) for leaf, own in leaves(inner)]
    if get_origin(hint) in (Union, types.UnionType):
        return [leaf for part in get_args(hint) for leaf in leaves(part)]
    return [(hint, ())]


def bounds_of(marks: Iterable[Any]) -> str:
    """The range that a field's metadata describes; empty if there is none.

    Example:
        >>> bounds_of(Share.__metadata__)
        'above 0 and at most 1'
    """
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = [limit for mark in marks for limit in getattr(mark, "metadata", ())]
    pairs = [(words[key], getattr(limit, key, None)) for limit in limits for key in words]
    parts = [f"{word} {value}" for word, value in pairs if value is not None]
    return " and ".join(parts)


def described(hint: Any) -> str:
    """The values that a type allows, as text.

    Example:
        >>> described(Count | None), described(CountOrShare), described(tuple[int, ...])
        ('an integer, at least 1', 'an integer, at least 1, or a number, above 0 and at most 1', 'a list of integers')
    """
    names = {str: "text", Path: "a path", int: "an integer", float: "a number", bool: "true or false"}
    many = {str: "texts", Path: "paths", int: "integers", float: "numbers"}
    parts = []
    for leaf, marks in leaves(hint):
        origin, arguments, bounds = get_origin(leaf), get_args(leaf), bounds_of(marks)
        if origin is Literal:
            parts.append(f"one of {', '.join(map(str, arguments))}")
        elif origin is tuple:
            (item, own), *_ = leaves(arguments[0])
            bounds = f"each {each}" if (each := bounds_of(own)) else ""
            description = next((mark.description for mark in own if getattr(mark, "description", None)), None)
            parts.append(f"a list of {description or many.get(item) or 'names, each ' + described(item)}")
        elif AllowInfNan(False) in marks:
            parts.append("a finite number")
        elif leaf is not type(None):
            parts.append(names.get(leaf, getattr(leaf, "__name__", str(leaf))))
        if bounds:
            parts[-1] += f", {bounds}"
    return ", or ".join(parts) if any("," in part for part in parts) else " or ".join(parts)


def converted(value: Any, hint: Any) -> Any:
    """A value from YAML or the command line in the type that its field asks for, if it can be read as such.

    Text becomes a number, a path, true, false or None where the field takes no text; a list becomes a tuple. Everything
    else stays, and pydantic refuses it.
    """
    kinds = [leaf for leaf, _ in leaves(hint)]
    for kind in (kind for kind in kinds if get_origin(kind) is tuple):
        if isinstance(value, list) or str not in kinds:
            values = value if isinstance(value, list) else [value]
            return None if value is None else tuple(converted(each, get_args(kind)[0]) for each in values)
    if not isinstance(value, str) or any(value in get_args(kind) for kind in kinds if get_origin(kind) is Literal):
        return value
    if value in ("None", "null") and type(None) in kinds:
        return None
    if bool in kinds and str not in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (Path, int, float):
        if kind in kinds and str not in kinds:
            try:
                return kind(value)
            except (ValueError, OverflowError):
                continue
    return value


def made(
    kind: type[T], options: Mapping[str, tuple[Any, str]], names: Mapping[str, str] | None = None, hint: str = ""
) -> T:
    """Make settings from values as they are read from YAML or the command line.

    Args:
        kind: A dataclass of settings; a field may be a group, which is a dataclass of its own.
        options: Name of a field, with a group's behind its name and a dot, to its value and how messages call it, such
            as `r.yaml:3: rank` or `--rank`.
        names: Name of a field to how a message on a missing value calls it.
        hint: The end of that message.

    Raises:
        RecipeError: A value is not allowed or missing; the message names the option.
    """
    hints, values, groups = types_of(kind), dict[str, Any](), dict[str, dict[str, Any]]()
    for name, (value, _) in options.items():
        group, _, own = name.rpartition(".")
        if group:
            groups.setdefault(group, {})[own] = converted(value, types_of(hints[group])[own])
        else:
            values[name] = converted(value, hints[name])
    try:
        for group, own_values in groups.items():
            values[group] = hints[group](**own_values)
        return kind(**values)
    except SettingError as error:
        if error.missing:
            missing = [(names or {}).get(name, name) for name in error.missing]
            raise RecipeError(f"{' and '.join(missing)} must be given{hint}") from None
        if error.field not in options:
            raise
        value, label = options[error.field]
        words = value if isinstance(value, list) else [value]
        shown = " ".join(map(str, words)) if label.startswith("-") else repr(value)
        raise RecipeError(f"{label} is {shown}, but must be {error.valid}") from None


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `word` most likely stands for, or None.

    Names with a dot are a method's settings: `select` stands for `gast.select` if no other group has it.
    """
    names = list(names)
    word = word.replace("-", "_").lower()
    if ELSEWHERE.get(word) in names:
        return ELSEWHERE[word]
    grouped = [name for name in names if name.endswith(f".{word}")]
    candidates = [*names, *(other for other, name in ELSEWHERE.items() if name in names)]
    close = grouped or [ELSEWHERE.get(one, one) for one in difflib.get_close_matches(word, candidates, n=1)]
    return " or ".join(close) if close else None


def documented(kind: type[S]) -> type[S]:
    """Show a callback's settings in `help()`: values, defaults and help at the line `Args:`, types in the signature."""
    owner = _owner(kind)
    lines = []
    for field in fields(owner):
        values, line = described(types_of(owner)[field.name]), help_of(owner)[field.name]
        text = f"{field.name}: {line} Values: {values}; default: {field.default}."
        lines.append(textwrap.fill(text, 112, initial_indent=" " * 4, subsequent_indent=" " * 8))
    if kind.__doc__ and lines:  # without indentation, as Python has it from 3.13 on
        kind.__doc__ = inspect.cleandoc(kind.__doc__).replace("Args:\n", "Args:\n" + "\n".join(lines) + "\n", 1)
    plain = get_type_hints(kind)
    signature = inspect.signature(kind.__init__)
    _, *own = signature.parameters.values()
    parameters = [each.replace(annotation=plain.get(each.name, Any)) for each in own]
    kind.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return kind
