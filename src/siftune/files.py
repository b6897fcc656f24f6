"""Write folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from siftune.errors import ModelError


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Give a folder to write to beside `out`; it becomes `out` at the end, or is removed after an error.

    Args:
        out: Folder that does not exist yet or is empty.

    Raises:
        ModelError: `out` is in use, or cannot be made; before anything is written.
    """
    place = Path(os.path.abspath(Path(out).expanduser()))  # "." has no name of its own
    refuse_full(out)
    try:
        partial = place.with_name(f".{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield partial
        if place.exists():
            place.rmdir()
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_full(out: str | Path) -> None:
    """Refuse a folder that is in use, or a file.

    Raises:
        ModelError: `out` exists and is no empty folder.
    """
    try:
        if Path(out).expanduser().exists() and any(Path(out).expanduser().iterdir()):
            raise ModelError(f"{out} is not empty; give another folder with --out.")
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: str | Path, error: OSError) -> ModelError:
    return ModelError(f"{out} cannot be written to ({error.strerror}); give another folder with --out.")
