"""Training rows of a run folder, read again for their texts, although another party may have made the folder.

The recipe in such a folder could name any file, and so could the places in a decision file. A file is read only if the
user named it: in this command, or when training by this very recipe, or scoring into this very file. `siftune train`
therefore adds the SHA-256 of a run's recipe to a list in the user's cache, and `siftune sift` and `siftune rows` that
of the file that they write (ours). No data set is fetched from the hub unless this command names it.
"""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from siftune.base.errors import DataError
from siftune.base.files import hash_of, open_to_append
from siftune.base.text import file_named, one_line, path_and_split
from siftune.data.rows import Row
from siftune.models.smollm2 import cache_root
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe, train_files
from siftune.recipe.training_rows import DROP_ROWS, used_rows

logger = logging.getLogger(__name__)

_RECIPE = "recipe.yaml"
_OWN = "recipes.txt"  # in the cache; a SHA-256 in hexadecimal on each line


class UnnamedFiles(DataError):
    """A run's recipe names files that the user has not named."""


def note_recipe(run: Path) -> None:
    """Record that this user trains by the recipe of a run folder; a warning if the cache cannot be written to."""
    note_file(run / _RECIPE)


def note_file(written: Path) -> None:
    """Record that this user has written a file that names files of rows; a warning if the cache can't be written to."""
    path = cache_root() / _OWN
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_to_append(path) as file:
            file.write(f"{hash_of(written)}\n")
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): later commands will ask for the files of the rows of %s",
            path,
            error.strerror or error,
            written,
        )


def keep_edited(written: Path) -> None:
    """Rename a file that a command is about to write again, if somebody has edited it since."""
    if not written.is_file() or is_own_file(written):
        return
    names = (written.with_stem(f"{written.stem}.edited{number or ''}") for number in count())
    kept = next(name for name in names if not name.exists())
    written.rename(kept)
    logger.warning("%s was edited, or written elsewhere: it is now %s", written, kept)


def is_own(run: Path) -> bool:
    """Whether this user trained by the recipe of a run folder on this machine."""
    return is_own_file(run / _RECIPE)


def is_own_file(written: Path) -> bool:
    """Whether this user has written this very file on this machine."""
    try:
        return hash_of(written) in (cache_root() / _OWN).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


def rows_again(run: Path, files: Sequence[str] = ()) -> list[Row]:
    """Read the training rows of a run folder, without those that it left out; arguments and errors as `recipe_again`.

    Raises:
        DataError: A file cannot be read.
    """
    return used_rows(run, recipe_again(run, files), named=files)


def recipe_again(run: Path, files: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder, with the files of its training rows where they are now.

    Args:
        run: The run folder.
        files: Files and data sets that may be read. They stand for those of the same name in the recipe, which may
            have been in another folder.

    Raises:
        UnnamedFiles: The recipe names something else, and is not the user's own.
        RecipeError: The recipe cannot be read.
    """
    recipe: Recipe = replace(load_recipe(run / _RECIPE), eval=None, keep=None)  # training rows alone are read
    own_list = _own_list(run, recipe)
    recipe = recipe if own_list is None else replace(recipe, drop_rows=None)
    names = [*train_files(recipe), *filter(None, (recipe.target, recipe.drop_rows))]
    own = is_own(run)
    places = {name: _place(name, files, own) for name in names}
    if missing := [name for name, place in places.items() if place is None]:
        listed = " ".join(shlex.quote(one_line(name)) for name in names)
        command = f"`siftune rows {shlex.quote(str(run))} --files {listed}`"
        if own:
            which = f"{' and '.join(map(one_line, missing))} {'are no files' if len(missing) > 1 else 'is no file'}"
            raise UnnamedFiles(
                f"the texts of {run} are unknown, because {which} here: run {command}, with the paths that the files "
                "have now, under the same names"
            )
        raise UnnamedFiles(
            f"the texts of {run} are unknown, because this user has not trained by its recipe on this machine: to read "
            f"{'them' if len(missing) > 1 else 'the file'}, run {command}"
        )
    train = tuple(str(places[name]) for name in train_files(recipe))
    target, drop_rows = (name and places[name] for name in (recipe.target, recipe.drop_rows))
    return replace(recipe, train=train, target=target, drop_rows=own_list or drop_rows)


def _own_list(run: Path, recipe: Recipe) -> str | None:
    """The list of rows to leave out that a training has copied to its run folder, which may have been moved since."""
    if recipe.drop_rows is None:
        return None
    copied = run / Path(recipe.drop_rows).name
    return str(copied) if copied.stem == DROP_ROWS and copied.is_file() else None


def _place(name: str, files: Sequence[str], own: bool) -> str | None:
    """The file or data set to read for a name in a recipe; None if the user named none."""
    return file_named(name, files) or (name if own and Path(path_and_split(name)[0]).expanduser().exists() else None)
