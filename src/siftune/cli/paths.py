"""Early checks of the files and folders that options name, before torch is imported.

An option is recognised by its name; numbers, such as the share `keep` of `emulate`, are no paths. The commands check
contents.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from siftune.base.errors import KitError, ModelError, RecipeError
from siftune.data.read import check_columns, check_source, read_template
from siftune.methods.options import OWN
from siftune.models.smollm2 import NAME as SMOLLM2
from siftune.models.source import resolve, similar_folder, why_missing

_DATA = (
    "train",
    "eval",
    "target",
    "avoid",
    "keep",
    "data",
    "calibration",
    "calibration_prompts",
    "held_out",
    "calibration_others",
)
_ROWS = ("train", "eval", "target", "avoid")  # in the columns that a recipe names
_FOLDERS = ("kit", "returned", "path", "folders")
_RUNS = ("run", "runs")  # run folders, or names of models
_FILES = ("public_key", "sign", "drop_rows")
_MODELS = ("model", "base")
_SIGNS = ("recipe.yaml", "adapter_config.json", "tuned_layers.json", "config.json")  # of run, adapter, layers, model
_LONGEST = 2**24  # bytes of a manifest; its keys are sorted, so the one that names its kind comes late


def check_paths(options: Any) -> None:
    """Refuse options that name a file or folder that does not exist, a folder that holds no model, and swapped kits.

    Args:
        options: Options of a command.

    Raises:
        InputError: The message names the option, the path and the working directory.
    """
    values = {field.name: _listed(getattr(options, field.name)) for field in fields(options)}
    for name in _DATA:
        for source in values.get(name, ()):
            if (name, source) not in (("keep", OWN), ("calibration", OWN)):
                check_source(source)
    if getattr(options, "bad_rows", None) == "stop":
        for source in (each for name in _ROWS for each in values.get(name, ())):
            check_columns(source, options.columns)
    for model in (each for name in _MODELS for each in values.get(name, ())):
        if model != SMOLLM2 and not (Path(model).expanduser() / "manifest.json").exists():  # a kit, checked later
            resolve(model)
    if isinstance(template := getattr(options, "template", None), Path):
        read_template(template)
    for name in _FOLDERS:
        for path in values.get(name, ()):
            if not Path(path).expanduser().exists():
                raise RecipeError(f"there is no folder {path} {_place(path)}")
    for name in _RUNS:
        for path in values.get(name, ()):
            if _is_path(path) and not Path(path).expanduser().exists():
                raise ModelError(f"there is no run {path}: no such folder {_place(path)}")
    for name in _FILES:
        for path in values.get(name, ()):
            if not Path(path).expanduser().exists():
                raise RecipeError(f"--{name.replace('_', '-')} {path}: no such file {_place(path)}")
    _check_exchange(values.get("kit", ()), values.get("returned", ()))


def _check_exchange(kits: Sequence[str], returns: Sequence[str]) -> None:
    """Refuse a kit and a return that are swapped, and a folder beside the return."""
    for kit in kits:
        if _manifest_of(kit) == "return":
            swapped = next((each for each in returns if _manifest_of(each) == "kit"), None)
            advice = f"and --return {swapped} is a kit: swap them" if swapped else "not a kit: name it with --return"
            raise KitError(f"--kit {kit} is a return, {advice}")
    for returned in returns:
        path = Path(returned).expanduser()
        if _manifest_of(returned) == "kit":
            raise KitError(f"--return {returned} is a kit, not a return: give RUN/return of a run on the kit")
        beside = next((each / "return" for each in (path, path.parent) if _manifest_of(each / "return")), None)
        if not _manifest_of(returned) and beside:
            raise KitError(f"--return {returned} is no return: give {beside}")


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


def _manifest_of(folder: str | Path) -> str:
    """The kind of a folder by its manifest, "kit" or "return"; empty for another folder."""
    manifest = Path(folder).expanduser() / "manifest.json"
    try:
        if not manifest.is_file():
            return ""
        with manifest.open("rb") as file:
            content = file.read(_LONGEST)
    except OSError:  # reported by the command that reads it
        return ""
    return next((kind for kind in ("kit", "return") if f'"siftune_{kind}"'.encode() in content), "")


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
