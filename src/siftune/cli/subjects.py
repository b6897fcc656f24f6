"""Subjects of `eval`, `ask` and `export`: run folders, adapter folders, kits and models."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from siftune.base.errors import AdapterError, InputError, KitError, ModelError, RecipeError
from siftune.base.files import refuse_links
from siftune.base.json_files import read_json
from siftune.base.links import check_links
from siftune.cli.paths import refuse_unknown
from siftune.data.encode import use_template
from siftune.models.adapters.attach import load_adapter
from siftune.models.adapters.saved import CONFIG, read_config
from siftune.offsite.exchange.returned import open_return
from siftune.offsite.exchange.tune import KitSource, find_kit, put_in_return
from siftune.offsite.kit.folder import Kit
from siftune.recipe.again import is_own
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.train.folder.checkpoints import step_of, whole_checkpoints
from siftune.train.folder.run import RunFolder
from siftune.train.folder.weights import holds_tuned, put_in, read_about, read_tuned
from siftune.train.source import ModelSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model, and what was trained on it if anything.

    Attributes:
        name: As the user named it.
        base: Source of the base model, for `load_model`, or the folder of a kit.
        adapter: Folder of what was trained: an adapter in PEFT's format, tuned layers, or the return of a run on a
            kit. None for a model by itself.
        recipe: The recipe of a run folder; None otherwise.
        kit: The kit that `base` names, read and checked; None for another model.
    """

    name: str
    base: str
    adapter: Path | None = None
    recipe: Recipe | None = None
    kit: Kit | None = None


def find_subjects(sources: Sequence[str], public_key: Path | None = None, base: str | None = None) -> list[Subject]:
    """Resolve several names; see `find_subject`. A kit that several of them use is read once."""
    find = functools.cache(find_kit)
    return [find_subject(source, public_key, base, find) for source in sources]


def find_subject(
    source: str,
    public_key: Path | None = None,
    base: str | None = None,
    find: Callable[[str, Path | None], Kit | None] = find_kit,
) -> Subject:
    """Resolve a name.

    Args:
        source: A run folder (`recipe.yaml`, and `adapter/` or `return/`), a PEFT adapter folder
            (`adapter_config.json`), a folder of tuned layers (`tuned_layers.json`), a kit, or anything that
            `load_model` takes.
        public_key: PEM file of a model owner's public key: the subject must then be a kit that is signed with it, or
            have been trained on one.
        base: What something was trained on, in the place of what it names itself: a model or a kit.
        find: Finds, reads and checks a kit; who names several subjects gives one that remembers.

    Raises:
        KitError: The kit is damaged or not signed by the key, or a key was given and there is no kit; or the return
            beside what was trained is damaged or of another kit.
        ModelError: There is nothing of that name, a run folder has no adapter in it, or its base is gone.
        AdapterError: An adapter's config can't be read, or names no base model.
        RecipeError: A run's recipe can't be read.
    """
    subject = _subject(source)
    if subject.adapter is not None and base is not None:
        subject = replace(subject, base=base)
    elif subject.adapter is not None:
        _refuse_gone(subject)
    subject = replace(subject, kit=find(subject.base, public_key))
    if subject.kit is not None and subject.adapter is not None:
        returned = subject.adapter.parent / "return"
        # an adapter does not name its kit; the return beside it does
        if returned != subject.adapter and _is_return(returned):
            with open_return(returned, subject.kit):
                pass
    return subject


def _subject(source: str) -> Subject:
    """Resolve a name, without its kit."""
    path = Path(source).expanduser()
    if (path / "recipe.yaml").exists():
        refuse_links(path)
        recipe: Recipe = load_recipe(path / "recipe.yaml")
        return Subject(source, recipe.model, _trained_in(path), recipe)
    if (path / CONFIG).is_file():
        return Subject(source, _base_of(path), path)
    if holds_tuned(path):
        check_links(path)
        return Subject(source, read_about(path).base, path)
    refuse_unknown(source)
    return Subject(source, source)


def _refuse_gone(subject: Subject) -> None:
    """Refuse what was trained on a folder that is not there any more."""
    place = Path(subject.base).expanduser()
    if place.is_absolute() and not place.exists():
        raise ModelError(
            f"{subject.name} was trained on {subject.base}, which is not there: say with --base where it is."
        )


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
        KitError: A kit or a return is damaged, or they don't belong together.
    """
    model, tokenizer = load_base(subject, dtype)
    return put_on(model, subject, exact), tokenizer


def load_base(subject: Subject, dtype: str = "auto") -> tuple[Any, Any]:
    """Load model and tokenizer as they were before training; see `load_subject`."""
    source = ModelSource(subject.base) if subject.kit is None else KitSource(subject.kit)
    model, tokenizer = source.load(dtype)
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
    elif _is_return(folder):
        if subject.kit is None:
            raise KitError(f"{folder} is a return, but {subject.base} is no kit: give the kit that it was tuned on")
        put_in_return(model, folder, subject.kit)
    else:
        model = load_adapter(model, folder, subject.base, exact)
    return model.eval()


def template_of(subject: Subject, template: str | Path | None) -> str | Path:
    """Chat template for a subject: the one that the user gives, or else that of the run's recipe, or auto.

    Raises:
        RecipeError: The recipe names a file, and this user has not trained by it on this machine.
    """
    if template is not None:
        return template
    recipe = subject.recipe or Recipe()
    if isinstance(recipe.template, Path) and not is_own(Path(subject.name).expanduser()):
        raise RecipeError(
            f"{subject.name} was not trained on this machine, so the chat template that its recipe names is not read: "
            "give --template auto, chat, none or FILE"
        )
    return recipe.template


def take_template(folder: Path, tokenizer: Any) -> None:
    """Give a tokenizer the chat template of the training, if a file of it is in the folder of what was trained.

    Raises:
        RecipeError: It cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        use_template(path, tokenizer)


def is_of_kit(subject: Subject) -> bool:
    """Whether the subject is a kit, or was trained on one."""
    run = Path(subject.name).expanduser()
    return subject.kit is not None or _is_return(run / "return")


def _trained_in(run: Path) -> Path:
    """Find what a run has trained."""
    adapter, returned = run / "adapter", run / "return"
    if (adapter / CONFIG).is_file() or holds_tuned(adapter):
        trained = adapter
    elif _is_return(returned):
        trained = returned
    else:
        raise ModelError(f"the run folder {run} has no adapter yet; finish the run with siftune train --resume.")
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


def _is_return(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _base_of(adapter: Path) -> str:
    """Read which model an adapter belongs to."""
    base: str | None = read_config(adapter).get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"{adapter / CONFIG} names no base model; fill in base_model_name_or_path.")
    return base
