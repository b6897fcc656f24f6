"""Recipe files: read YAML, write YAML, and name the line of a key or value that is not allowed."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from siftune.base.errors import RecipeError
from siftune.base.settings import made, nearest, types_of
from siftune.base.text import path_and_split
from siftune.methods import all_parts
from siftune.methods.options import OWN
from siftune.models.smollm2 import NAME as SMOLLM2
from siftune.recipe.schema import R, Recipe, method_of


class _Entry(NamedTuple):
    """The value of a key, or the entries of a mapping, and the line of the key."""

    value: Any
    line: int


Given = Mapping[str, tuple[Any, str]]  # option -> its value, and how a message calls the option


def load_recipe(*paths: str | Path, kind: type[R] = Recipe, flags: Given | None = None) -> R:  # type: ignore[assignment]
    """Read YAML recipes: a later file overrides an earlier file, and flags override both.

    Paths inside a recipe are relative to the working directory, as in flags.

    Args:
        paths: YAML files that map options to values, and a method's name to a mapping of its settings; an empty file is
            a recipe of defaults.
        kind: The dataclass to fill: `Recipe`, or a subclass with further fields.
        flags: Options from the command line: name to value and flag.

    Raises:
        RecipeError: A file is missing, unreadable or not YAML; a key is unknown or given twice; a value is not allowed.
            The message names file, line and key.
    """
    given: dict[str, tuple[Any, str]] = {}
    for path in map(Path, paths):
        given |= _flat(path, kind)
    given |= flags or {}
    if given.get("target", (None, ""))[0] is not None:
        aimed = {part.settings.group: part.settings.with_target for part in all_parts()}
        for group, values in aimed.items():
            given |= {f"{group}.{n}": (v, f"{group}.{n}") for n, v in values.items() if f"{group}.{n}" not in given}
    return made(kind, given)


def options_of(kind: type) -> dict[str, Any]:
    """Names and types of all options of a dataclass; a group's behind its name and a dot, such as gast.select."""
    options: dict[str, Any] = {}
    for name, hint in types_of(kind).items():
        own = types_of(hint) if isinstance(hint, type) and is_dataclass(hint) else {}
        options |= {f"{name}.{part}": kind for part, kind in own.items()} or {name: hint}
    return options


def _flat(path: Path, kind: type) -> dict[str, tuple[Any, str]]:
    """The options that a file sets, those of groups too."""
    options, groups = options_of(kind), {part.settings.group for part in all_parts()}
    given: dict[str, tuple[Any, str]] = {}
    for key, entry in _read(path).items():
        where = f"{path}:{entry.line}: "
        if key in groups:
            if not isinstance(entry.value, dict):
                raise RecipeError(f"{where}{key} is {entry.value!r}, but must be a mapping of its settings")
            given |= {f"{key}.{n}": (_plain(e.value), f"{path}:{e.line}: {key}.{n}") for n, e in entry.value.items()}
        else:
            given[key] = _plain(entry.value), f"{where}{key}"
    for name, (_, label) in given.items():
        if name not in options:
            close = nearest(name, options) or nearest(name.rpartition(".")[2], options)
            hint = f"did you mean {close!r}?" if close else "`siftune train --help-all` lists the keys"
            raise RecipeError(f"{label.removesuffix(name)}unknown key {name!r}; {hint}")
    return given


def _plain(value: Any) -> Any:
    """A value without the lines of its parts."""
    return {key: _plain(part.value) for key, part in value.items()} if isinstance(value, dict) else value


_PLACES = (
    "model",
    "train",
    "eval",
    "target",
    "keep",
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
    if recipe.keep == OWN:
        del found["keep"]
    if isinstance(recipe.template, Path):
        found["template"] = recipe.template.expanduser().absolute()
    return replace(recipe, **found, out=recipe.out and str(Path(recipe.out).expanduser().absolute()))


def without_folders(recipe: R) -> R:
    """The recipe with the names of files and folders alone, for publication; hub ids stay."""
    names = {name: _last_part(getattr(recipe, name)) for name in (*_PLACES, "out")}
    if isinstance(recipe.template, Path):
        names["template"] = Path(recipe.template.name)
    return replace(recipe, **names, resume=False)


def _last_part(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_last_part, value))
    return Path(value).name if value and Path(value).expanduser().is_absolute() else value


def _in_full(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_in_full, value))
    if not isinstance(value, str) or not value:
        return value
    name, split = path_and_split(value)
    path = Path(name).expanduser()
    return f"{path.absolute()}{split}" if path.exists() else value


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
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


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
