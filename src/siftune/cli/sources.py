"""Sources of models: what a command loads for a name.

An ordinary model is a folder, a hub id or smollm2. A model of another kind is a folder with a file that tells its kind.
The module of a kind is imported only for such a folder.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

if TYPE_CHECKING:
    from siftune.recipe.schema import Recipe
    from siftune.train.folder.run_folder import RunFolder
    from siftune.train.source import Source

# file in the folder of a model of another kind, or of a return -> module with the functions of `Kind`
KINDS = {"manifest.json": "siftune.offsite.cli.source"}


class Kind(Protocol):
    """Functions of the module of a kind of models.

    A run on such a model may leave a return for the owner of the model, in the place of an adapter or beside it.
    """

    def find_source(self, name: str) -> "Source | None":
        """Read and check the model in a folder; None if it holds none of this kind."""

    def check_return(self, folder: Path, source: "Source") -> None:
        """Refuse a return that is damaged, or of another model."""

    def put_in_return(self, model: Any, folder: Path, source: "Source", base: str) -> None:
        """Put a return into the model that was loaded from a source, in place; `base` is the name of the source."""

    def refuse_export(self, name: str) -> NoReturn:
        """Refuse to merge into a model of this kind, and say what to do with a run on it."""

    def next_steps(self, recipe: "Recipe", run: "RunFolder", steps: int) -> list[str]:
        """Lines on a run of some steps that has left a return: where it is, and what to do with it."""


def is_ordinary(folder: str | Path) -> bool:
    """Whether no file tells that a folder is of another kind; so is the name of a model that is no folder."""
    return _module_of(folder) is None


def kind_of(folder: str | Path) -> Kind | None:
    """Import the module for a folder of another kind; None for an ordinary one."""
    module = _module_of(folder)
    return None if module is None else cast(Kind, import_module(module))


def source_of(name: str) -> "Source":
    """The source that a recipe's `model` names: a folder, a hub id or smollm2.

    Raises:
        KitError: The model is of another kind and damaged.
    """
    from siftune.train.source import ModelSource

    kind = kind_of(name)
    source = None if kind is None else kind.find_source(name)
    return ModelSource(name) if source is None else source


def _module_of(folder: str | Path) -> str | None:
    path = Path(folder).expanduser()
    return next((module for file, module in KINDS.items() if (path / file).is_file()), None)
