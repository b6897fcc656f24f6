"""Early checks of the files and folders that options name, before torch is imported.

An option is recognised by its name; a value that is no text, such as a number, is no path. The commands check contents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from siftune.base.errors import ModelError, RecipeError
from siftune.cli.sources import is_ordinary
from siftune.data.read import check_columns, check_source, read_template
from siftune.methods.options import OWN
from siftune.models.smollm2 import NAME as SMOLLM2
from siftune.models.source import resolve, similar_folder, why_missing

# what options name -> their names; a command adds its own in a table `PATHS`
_PATHS = {
    "rows": ("train", "eval", "target", "avoid", "data"),
    "texts": ("keep",),  # rows, or "own" for texts that the base model writes itself
    "folders": ("folders",),
    "runs": ("run", "runs"),  # run folders, or names of models
    "files": ("drop_rows",),
    "models": ("model", "base"),
}
_IN_COLUMNS = ("train", "eval", "target", "avoid")  # rows in the columns that a recipe names
_SIGNS = ("recipe.yaml", "adapter_config.json", "tuned_layers.json", "config.json")  # of run, adapter, layers, model


def check_paths(options: Any, own: Mapping[str, Sequence[str]]) -> None:
    """Refuse options that name a file or folder that does not exist, and a folder that holds no model.

    Args:
        options: Options of a command.
        own: Names of the command's own options, by what they name: rows, texts, folders, runs, files or models.

    Raises:
        InputError: The message names the option, the path and the working directory.
    """
    values = {field.name: _listed(getattr(options, field.name)) for field in fields(options)}
    named = {
        what: [(name, value) for name in (*names, *own.get(what, ())) for value in values.get(name, ())]
        for what, names in _PATHS.items()
    }
    for _, source in named["rows"]:
        check_source(source)
    for _, source in named["texts"]:
        if source != OWN:
            check_source(source)
    if getattr(options, "bad_rows", None) == "stop":
        for source in (each for name in _IN_COLUMNS for each in values.get(name, ())):
            check_columns(source, options.columns)
    for _, model in named["models"]:
        if model != SMOLLM2 and is_ordinary(model):  # others are checked when they are read
            resolve(model)
    if isinstance(template := getattr(options, "template", None), Path):
        read_template(template)
    for _, path in named["folders"]:
        if not Path(path).expanduser().exists():
            raise RecipeError(f"there is no folder {path} {_place(path)}")
    for _, path in named["runs"]:
        if _is_path(path) and not Path(path).expanduser().exists():
            raise ModelError(f"there is no run {path}: no such folder {_place(path)}")
    for name, path in named["files"]:
        if not Path(path).expanduser().exists():
            raise RecipeError(f"--{name.replace('_', '-')} {path}: no such file {_place(path)}")


def refuse_unknown(source: str) -> None:
    """Refuse a name of no folder and no model.

    Raises:
        ModelError: There is neither; the message names a folder of a similar name.
    """
    if Path(source).expanduser().exists() or source == SMOLLM2:
        return
    try:
        name = resolve(source)
        why = why_missing(name) if isinstance(name, str) else None
    except ModelError:
        why = "that is no hub id"
    if why is not None:
        similar = similar_folder(source, lambda path: any((path / name).is_file() for name in _SIGNS))
        guess = f"; did you mean {similar}?" if similar else ""
        raise ModelError(
            f"there is no run {source}: no such folder (working directory: {Path.cwd()}), and no model of that name "
            f"({why}){guess}"
        )


def _listed(value: Any) -> list[str]:
    """Values of an option as text; none if it is not given."""
    values = value if isinstance(value, tuple) else (value,)
    return [str(each) for each in values if isinstance(each, str | Path) and str(each)]


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _place(path: str) -> str:
    """The working directory, and a folder of a similar name."""
    similar = similar_folder(path, Path.is_dir)
    return f"(working directory: {Path.cwd()}){f'; did you mean {similar}?' if similar else ''}"
