"""Kits as models that commands take, and returns as results of runs on them: the entry in `cli/sources.py`."""

import shlex
from pathlib import Path
from typing import NoReturn

from torch import nn

from siftune.base.errors import KitError, ModelError
from siftune.cli.options import as_flag
from siftune.offsite.audits.settings import AuditOptions
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange.returned import open_return, read_return
from siftune.offsite.exchange.tune import KitSource
from siftune.offsite.kit.folder import is_kit, read_kit
from siftune.recipe.schema import Recipe, rate_of, train_files
from siftune.train.folder.run_folder import RunFolder
from siftune.train.folder.weights import put_in
from siftune.train.source import Source


def find_source(name: str) -> KitSource | None:
    """Read and check a kit; None if the folder's manifest is of something else.

    Raises:
        KitError: The kit is damaged.
    """
    path = Path(name).expanduser()
    return KitSource(read_kit(path)) if is_kit(path) else None


def check_return(folder: Path, source: Source) -> None:
    """Check a return of a run on a kit.

    Raises:
        KitError: The return is damaged, or of another kit.
    """
    assert isinstance(source, KitSource)
    with open_return(folder, source.kit):
        pass


def put_in_return(model: nn.Module, folder: Path, source: Source, base: str) -> None:
    """Put a return into the emulator of the kit that it was trained on, without PEFT around it, in place.

    Raises:
        KitError: The return is damaged or of another kit, or the source is no kit.
    """
    if not isinstance(source, KitSource):
        raise KitError(f"{folder} is a return, but {base} is no kit: give the kit that it was tuned on")
    names = outer_names(model, source.kit.manifest.split)
    put_in(model, {names[name]: tensor for name, tensor in read_return(folder, source.kit).items()}, folder)


def refuse_export(name: str) -> NoReturn:
    """Refuse to merge into an emulator.

    Raises:
        ModelError: Always.
    """
    raise ModelError(
        f"{name} is of a kit, an emulator that only stands in for a model: send the folder `return` of the run to the "
        "model's owner, whose `siftune plug` makes the tuned model"
    )


def next_steps(recipe: Recipe, run: RunFolder, steps: int) -> list[str]:
    """Lines on the return of a run of some steps, and on what data owner and model owner do with it."""
    return [
        f"return in {run.returned}: send it to the model's owner, who runs "
        "`siftune plug --model BASE --kit KIT --return RETURN --out TUNED`",
        f"before you send it, measure what it reveals: {_audit(recipe, run, steps)}",
        f"next: `siftune eval {shlex.quote(str(run.path))} --data FILE`",
    ]


def _audit(recipe: Recipe, run: RunFolder, steps: int) -> str:
    """The command that audits a return with the rows and settings of its training, which shadow models have too."""
    files, defaults = train_files(recipe), AuditOptions()
    words = ["siftune", "audit", "--kit", recipe.model, "--return", str(run.returned), "--train", files[0]]
    words += ["--eval", recipe.eval or "OTHERS"]
    for name in ("limit", "columns", "template", "max_length", "completion_only"):
        if (value := getattr(recipe, name)) != getattr(defaults, name):
            words += as_flag(name, value)
    trained = {"steps": steps, "lr": rate_of(recipe), "batch_size": recipe.batch_size * recipe.accumulate}
    words += [word for name, value in trained.items() for word in as_flag(name, value)]
    is_part = len(files) > 1 or recipe.eval_share or recipe.drop_rows or recipe.target or recipe.bad_rows == "drop"
    rows = ", with a file of exactly the rows that it was tuned on as --train" if is_part else ""
    return f"`{shlex.join(words)}`{rows}"
