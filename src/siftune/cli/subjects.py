"""Subjects of `eval`, `ask` and `export`: run folders, adapter folders and models."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from siftune.base.errors import AdapterError, InputError, KitError, ModelError
from siftune.base.files import refuse_links
from siftune.base.json_files import read_json
from siftune.cli.paths import refuse_unknown
from siftune.cli.sources import Kind, kind_of, source_of
from siftune.data.encode import use_template
from siftune.models.adapters.attach import load_adapter
from siftune.models.adapters.saved import CONFIG, read_config
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import refuse_missing
from siftune.train.folder.checkpoints import step_of, whole_checkpoints
from siftune.train.folder.run_folder import RunFolder
from siftune.train.folder.weights import holds_tuned, put_in, read_about, read_tuned
from siftune.train.source import ModelSource, Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model, and what was trained on it if anything.

    Attributes:
        name: As the user named it.
        base: Name of the base model.
        source: What the name stands for.
        adapter: Folder of what was trained: an adapter in PEFT's format, tuned layers, or a return. None for a model by
            itself.
        recipe: The recipe of a run folder; None otherwise.
    """

    name: str
    base: str
    source: Source
    adapter: Path | None = None
    recipe: Recipe | None = None

    @property
    def is_ordinary(self) -> bool:
        """Whether the base is an ordinary model; see `sources.KINDS`."""
        return isinstance(self.source, ModelSource)


def find_subjects(sources: Sequence[str], base: str | None = None) -> list[Subject]:
    """Resolve several names; see `find_subject`. A source that several of them have is read once."""
    find = functools.cache(source_of)
    return [find_subject(source, base, find) for source in sources]


def find_subject(source: str, base: str | None = None, find: Callable[[str], Source] = source_of) -> Subject:
    """Resolve a name.

    Args:
        source: A run folder (`recipe.yaml`, and `adapter/` or `return/`), a PEFT adapter folder
            (`adapter_config.json`), a folder of tuned layers (`tuned_layers.json`), or anything that `source_of` takes.
        base: What something was trained on, in the place of what it names itself.
        find: Finds a source; who names several subjects gives one that remembers.

    Raises:
        KitError: As `source_of`; or the return beside what was trained is damaged, or of another model, or the base is
            no kit.
        ModelError: There is nothing of that name, a run folder has no adapter in it, or its base is gone.
        AdapterError: An adapter's config can't be read, or names no base model.
        RecipeError: A run's recipe can't be read.
    """
    path = Path(source).expanduser()
    recipe: Recipe | None = None
    model: str
    if (path / "recipe.yaml").exists():
        refuse_links(path)
        recipe = load_recipe(path / "recipe.yaml")
        trained, model = _trained_in(path), recipe.model
    elif (path / CONFIG).is_file():
        trained, model = path, base or _base_of(path)
    elif holds_tuned(path):
        trained, model = path, read_about(path).base
    else:
        refuse_unknown(source)
        return Subject(source, source, find(source))
    if base is None:
        _refuse_gone(source, model)
    else:
        model = base
    subject = Subject(source, model, find(model), trained, recipe)
    returned = trained.parent / "return"
    # an adapter does not name a model of another kind; the return beside it does
    if returned != trained and (kind := kind_of(returned)) is not None:
        if subject.is_ordinary:
            raise KitError(
                f"{source} was trained on a kit, but {model} is none, and may have other layers: give the kit with "
                "--base, or the model that `siftune plug` made"
            )
        kind.check_return(returned, subject.source)
    return subject


def _refuse_gone(source: str, base: str) -> None:
    """Refuse what was trained on a folder that is not there any more."""
    place = Path(base).expanduser()
    if place.is_absolute() and not place.exists():
        raise ModelError(f"{source} was trained on {base}, which is not there: say with --base where it is")


def load_subject(subject: Subject, dtype: str = "auto", exact: bool = False) -> tuple[Any, Any]:
    """Load model and tokenizer, and put on what was trained.

    Args:
        subject: What to load.
        dtype: Data type of the base, for `load_model`.
        exact: Keep the adapter in float32 whatever the base's dtype, as for merging; slower on many machines.

    Returns:
        The model in eval mode on the accelerator if there is one, PEFT-wrapped if there is an adapter in PEFT's
        format; and the tokenizer.

    Raises:
        ModelError: As `load_model`.
        AdapterError: The adapter can't be read or doesn't fit the model.
        KitError: A model of another kind or a return is damaged, or they don't belong together.
    """
    model, tokenizer = load_base(subject, dtype)
    return put_on(model, subject, exact), tokenizer


def load_base(subject: Subject, dtype: str = "auto") -> tuple[Any, Any]:
    """Load model and tokenizer as they were before training; see `load_subject`."""
    model, tokenizer = subject.source.load(dtype)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def put_on(model: Any, subject: Subject, exact: bool = False) -> Any:
    """Put on a base model, in place, what was trained on it; see `load_subject`.

    Returns:
        The tuned model in eval mode.
    """
    folder = subject.adapter
    if folder is None:
        return model
    if holds_tuned(folder):
        put_in(model, read_tuned(folder), folder)
    elif (kind := kind_of(folder)) is not None:
        kind.put_in_return(model, folder, subject.source, subject.base)
    else:
        model = load_adapter(model, folder, subject.base, exact)
    return model.eval()


def template_of(subject: Subject, template: str | Path | None) -> str | Path:
    """Chat template for a subject: the one that the user gives, or else that of the run's recipe, or auto.

    Raises:
        DataError: The recipe names a file that is missing.
    """
    if template is not None:
        return template
    recipe = subject.recipe or Recipe()
    if isinstance(recipe.template, Path):
        refuse_missing(Path(subject.name).expanduser(), [str(recipe.template)])
        logger.info("%s: the chat template of the recipe of %s", recipe.template, subject.name)
    return recipe.template


def take_template(folder: Path, tokenizer: Any) -> None:
    """Give a tokenizer the chat template of the training, if a file of it is in the folder of what was trained.

    Raises:
        RecipeError: It cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        use_template(path, tokenizer)


def kind_of_subject(subject: Subject) -> Kind | None:
    """The kind of a subject's base, or of the return that a run has left; None for an ordinary model."""
    base = None if subject.is_ordinary else kind_of(subject.base)
    return base or kind_of(Path(subject.name).expanduser() / "return")


def _trained_in(run: Path) -> Path:
    """Find what a run has trained."""
    adapter, returned = run / "adapter", run / "return"
    if (adapter / CONFIG).is_file() or holds_tuned(adapter):
        trained = adapter
    elif kind_of(returned) is not None:
        trained = returned
    else:
        raise ModelError(f"the run folder {run} has no adapter yet; finish the run with siftune train --resume {run}")
    _tell_older(run, trained)
    return trained


def _tell_older(run: Path, trained: Path) -> None:
    """Warn of weights that were changed since, and of those of a resumed run that has not ended, which are older."""
    try:
        steps = int(read_json(run / "run.json", dict[str, Any])["summary"]["steps"])
    except (InputError, ValueError, KeyError, TypeError):
        return
    if changed := RunFolder(run, create=False).changed_weights():
        logger.warning("%s is not what the run wrote: it was changed or damaged since", trained / changed[0])
    newest = next(map(step_of, whole_checkpoints(run / "checkpoints", hashes=False)), 0)
    if newest > steps:
        logger.warning(
            "%s is of step %d, but the run has trained to step %d since: siftune train --resume %s finishes it",
            *(trained, steps, newest, run),
        )


def _base_of(adapter: Path) -> str:
    """Read which model an adapter belongs to."""
    base: str | None = read_config(adapter).get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"{adapter / CONFIG} names no base model: fill in base_model_name_or_path, or give --base")
    return base
