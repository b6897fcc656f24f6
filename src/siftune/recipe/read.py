"""Recipe files: YAML in, YAML out, and what to say where a key or value does not fit."""

import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from siftune.base.errors import RecipeError
from siftune.base.settings import Settings, in_words, nearest
from siftune.methods import all_parts
from siftune.models.smollm2 import NAME as SMOLLM2
from siftune.recipe.schema import R, Recipe, method_of


class _Entry(NamedTuple):
    """What stands behind a key: a value, or a mapping's own entries."""

    value: Any
    line: int


def load_recipe(*paths: str | Path, kind: type[R] = Recipe, target: bool = False) -> R:  # type: ignore[assignment]
    """Read YAML recipes; a later file overrides an earlier one, what none names keeps its default.

    Paths inside a recipe are relative to the working directory, as flags are.

    Args:
        paths: YAML files, each a mapping from field to value, and for each method's settings a mapping of its own; an
            empty file is a recipe of defaults.
        kind: The dataclass to fill: `Recipe` or a subclass with further fields.
        target: A target will be given besides. With one, here or in a file, methods have the defaults that their
            settings name in `with_target`.

    Raises:
        RecipeError: A file is missing, unreadable or not YAML; a key is unknown or given twice; a value has
            the wrong type. The message names file, line and key.
    """
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for path in map(Path, paths):
        for key, entry in _read(path).items():
            values[key] = _value(key, entry, hints, values.get(key), f"{path}:{entry.line}")
    if target or values.get("target") is not None:
        values = _aimed(values, hints)
    return kind(**{key: hints[key](**value) if _is_group(hints[key]) else value for key, value in values.items()})


def _aimed(values: dict[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Put the defaults of a run with a target below what was given."""
    groups = {key: hint.with_target for key, hint in hints.items() if _is_group(hint) and hint.with_target}
    return {**values, **{key: {**below, **values.get(key, {})} for key, below in groups.items()}}


_PLACES = (
    "model",
    "train",
    "eval",
    "target",
    "drop_rows",
    "from_adapter",
)  # what may be a file or folder


def anchored(recipe: R) -> R:
    """The recipe with files and folders that are there named in full, so that it holds wherever it is read.

    Hub ids and names of packaged models stay as they are.
    """
    found = {name: _in_full(getattr(recipe, name)) for name in _PLACES}
    if recipe.model == SMOLLM2:
        del found["model"]
    return replace(recipe, **found, out=recipe.out and str(Path(recipe.out).expanduser().absolute()))


def _in_full(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_in_full, value))
    path = Path(value).expanduser() if isinstance(value, str) and value else None
    return str(path.absolute()) if path is not None and path.exists() else value


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML, every field spelled out; `load_recipe` reads it back as it was.

    Of the methods' settings those of the chosen one are written: others have no effect.
    """
    return yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Field -> value of a recipe, as YAML can hold it; of the methods' settings the chosen one's, under its name."""
    groups = {part.settings.group for part in all_parts()}
    chosen = {part.settings.group for part in method_of(recipe).parts}
    values: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name not in groups:
            values[field.name] = _yaml(value)
        elif field.name in chosen:
            values[field.name] = {name: _yaml(part) for name, part in value.to_dict().items()}
    return values


def _yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_group(hint: Any) -> bool:
    return is_dataclass(hint) and issubclass(hint, Settings)  # type: ignore[arg-type]


def _value(key: str, entry: _Entry, hints: Mapping[str, Any], before: Any, where: str) -> Any:
    """Return an entry as the type of its field; a group as a dict, with what earlier files said of it."""
    if key not in hints:
        raise RecipeError(f"{where}: unknown key {key!r}; {_hint(key, hints)}")
    if not _is_group(hints[key]):
        return _converted(key, entry.value, hints[key], where)
    if not isinstance(entry.value, dict):
        shown = _shown(entry.value)
        raise RecipeError(f"{where}: {key} must hold options of its own, each on a line of its own, not {shown}")
    inner, path = get_type_hints(hints[key]), where.rpartition(":")[0]
    names = Settings.names(hints[key])
    values = dict(before or {})
    for name, part in entry.value.items():
        place = f"{path}:{part.line}"
        if name in names:
            values[name] = _converted(f"{key}.{name}", part.value, inner[name], place)
        else:
            raise RecipeError(f"{place}: unknown key '{key}.{name}'; {_hint(name, names)}")
    return values


def _converted(key: str, value: Any, hint: Any, where: str) -> Any:
    try:
        return _convert(_plain(value), hint)
    except TypeError:
        raise RecipeError(f"{where}: {key} must be {in_words(hint)}, not {_shown(value)}") from None


def _shown(value: Any) -> str:
    plain = _plain(value)
    return f"{plain!r} ({type(plain).__name__})"


def _plain(value: Any) -> Any:
    """A value without the lines where its parts stand."""
    return {key: _plain(part.value) for key, part in value.items()} if isinstance(value, dict) else value


def _hint(key: str, names: Iterable[str]) -> str:
    close = nearest(key, names)
    return f"did you mean {close!r}?" if close else "`siftune train --help` lists the keys"


def _read(path: Path) -> dict[str, _Entry]:
    """Read one YAML file as key -> value and line."""
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
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply for a recipe, which is made of lines `key: value`") from None
    except ValueError as error:  # a date with a 13th month, a number of 5,000 digits
        raise RecipeError(f"{path}: not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without aliases, by which few lines can stand for endless ones."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases such as *name are not for recipes", problem_mark=mark)
        return super().compose_node(parent, index)


def _entries(path: Path, text: str) -> dict[str, _Entry]:
    """Parse a recipe; an empty one has no entries."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return {} if node is None else _mapping(path, loader, node)


def _mapping(path: Path, loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, _Entry]:
    """Walk the lines of a mapping; YAML itself would let the second of two like keys win in silence."""
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}:{node.start_mark.line + 1}: a recipe is made of lines `key: value`")
    entries: dict[str, _Entry] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{path}:{line}: a recipe is made of lines `key: value`")
        if key.value in entries:
            raise RecipeError(f"{path}:{line}: {key.value} is given twice, first in line {entries[key.value].line}")
        nested = isinstance(value, yaml.MappingNode)
        content = _mapping(path, loader, value) if nested else loader.construct_object(value, deep=True)
        entries[key.value] = _Entry(content, line)
    return entries


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, or raise TypeError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _convert(value, arguments[0])
    if origin in (Union, types.UnionType):
        for part in arguments:
            try:
                return _convert(value, part)
            except TypeError:
                continue
    elif origin is tuple and isinstance(value, list | str):  # a word is a list of one
        value = [value] if isinstance(value, str) else value
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
