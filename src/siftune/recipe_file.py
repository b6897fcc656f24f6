"""Recipe files: YAML in, YAML out, and what to say where a key or value does not fit."""

import difflib
import types
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from siftune.config import R, Recipe
from siftune.errors import RecipeError

# names that other trainers use, so that the hint is right where spelling alone would not find it
_ELSEWHERE = {
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


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `word` most likely stands for, or None."""
    names = list(names)
    word = word.replace("-", "_").lower()
    if _ELSEWHERE.get(word) in names:
        return _ELSEWHERE[word]
    close = difflib.get_close_matches(word, names, n=1)
    return close[0] if close else None


def wanted(hint: Any) -> str:
    """Say in words what values the type `hint` of a field admits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(part) for part in arguments)
    if origin is tuple:
        return "a list of names" if arguments[0] is str else f"a list, each {wanted(arguments[0])}"
    words = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
    return "nothing" if hint is type(None) else words.get(hint, getattr(hint, "__name__", str(hint)))


def load_recipe(*paths: str | Path, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Read YAML recipes; a later file overrides an earlier one, what none names keeps its default.

    Paths inside a recipe are relative to the working directory, as flags are.

    Args:
        paths: YAML files, each a flat mapping from field to value; an empty file is a recipe of defaults.
        kind: The dataclass to fill: `Recipe` or a subclass with further fields.

    Raises:
        RecipeError: A file is missing, unreadable or not YAML; a key is unknown or given twice; a value has
            the wrong type. The message names file, line and key.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for path in map(Path, paths):
        for key, (value, line) in _read(path).items():
            if key not in hints:
                raise RecipeError(f"{path}:{line}: unknown key {key!r}; {_hint(key, hints)}")
            try:
                values[key] = _convert(value, hints[key])
            except TypeError:
                found = f"{value!r} ({type(value).__name__})"
                raise RecipeError(f"{path}:{line}: {key} must be {wanted(hints[key])}, not {found}") from None
    return kind(**values)


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML, every field spelled out; `load_recipe` reads it back as it was."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _hint(key: str, names: Iterable[str]) -> str:
    close = nearest(key, names)
    return f"did you mean {close!r}?" if close else "`siftune train --help` lists the keys"


def _read(path: Path) -> dict[str, tuple[Any, int]]:
    """Read one YAML file as key -> (value, line)."""
    try:
        return _entries(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist (looked in {Path.cwd()})") from None
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text: byte {error.start} is invalid") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}{_where(error)}: not valid YAML: {_problem(error)}") from None


def _entries(path: Path, text: str) -> dict[str, tuple[Any, int]]:
    """Walk the lines of a recipe; YAML itself would let the second of two like keys win in silence."""
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    entries: dict[str, tuple[Any, int]] = {}
    if node is None:
        return entries
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}:{node.start_mark.line + 1}: a recipe is made of lines `key: value`")
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{path}:{line}: a recipe is made of lines `key: value`")
        if key.value in entries:
            raise RecipeError(f"{path}:{line}: {key.value} is given twice, first in line {entries[key.value][1]}")
        entries[key.value] = (loader.construct_object(value, deep=True), line)
    return entries


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, or raise TypeError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for part in arguments:
            try:
                return _convert(value, part)
            except TypeError:
                continue
    elif origin is tuple and isinstance(value, list):
        return tuple(_convert(part, arguments[0]) for part in value)
    elif (origin is Literal and value in arguments) or type(value) is hint:
        return value
    elif hint is float and type(value) in (int, str):
        return _number(value)
    raise TypeError


def _number(value: int | str) -> float:
    """Read a float; YAML 1.1 takes `5e-4`, without a point, for text."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise TypeError from None
