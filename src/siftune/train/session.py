"""What a training starts from: settings, rows, model and tokens, checked in the order of the cost of a check.

    settled        settings alone: contradictions, packages of trackers, an adapter to start from, the model's source
    read_session   rows as read
    open_session   the model, which may have to be fetched; then the tokens of the rows

`siftune train`, its dry run and sweeps of rates begin with these functions.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.files import Progress
from siftune.base.ranks import first_rank_first, from_first
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.recipe.training_rows import Read, read_rows
from siftune.train.arguments import check_trackers
from siftune.train.folder.weights import adopted
from siftune.train.prepare import Prepared, prepare, refuse_long, refuse_read
from siftune.train.source import ModelSource, Source


@dataclass(frozen=True)
class Session:
    """Settings, rows, model and tokens of a training."""

    recipe: Recipe  # settled
    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared

    @property
    def data(self) -> Mapping[str, Dataset]:
        """Tokenised rows, by part."""
        return self.prepared.data


def settled(recipe: Recipe, source_of: Callable[[str], Source] = ModelSource) -> tuple[Recipe, Source]:
    """Check and complete a recipe, and find the source of its model.

    Args:
        recipe: Settings, checked or not.
        source_of: Maps the recipe's `model` to its source; by default an ordinary model.

    Returns:
        The recipe with all defaults, with the type and the shape of an adapter to start from, and with the layers that
        the source determines; and the source. All ranks have those of the first.

    Raises:
        InputError: Settings contradict each other, or the adapter, the model or a tracker's package is missing.
    """
    check(recipe)
    check_trackers(recipe.report_to)
    with_adapter = from_first(lambda: adopted(recipe))
    if with_adapter != recipe:  # type and shape of an adapter that was trained before are checked too
        check(with_adapter)
    recipe = from_first(lambda: resolve_recipe(with_adapter))
    source = source_of(recipe.model)
    return source.settle(recipe), source


def read_session(recipe: Recipe, source: Source, read: Read | None = None) -> Read:
    """Read the rows of a settled recipe, and refuse bad ones before the model is loaded.

    Args:
        recipe: As of `settled`.
        source: The model's source.
        read: The rows, which are then not read again.

    Raises:
        InputError: Rows cannot be used.
    """
    read = read or read_rows(recipe)
    refuse_read(recipe, read, source.tokenizer)
    return read


def open_session(recipe: Recipe, source: Source, read: Read, stage: AbstractContextManager[Progress]) -> Session:
    """Load the model of a settled recipe, and tokenise its rows.

    Args:
        recipe: As of `settled`.
        source: The model's source.
        read: As of `read_session`.
        stage: Shows progress while rows are tokenised.

    Raises:
        InputError: Rows or model cannot be used.
    """
    with first_rank_first():
        model, tokenizer = source.load(recipe.dtype, recipe.quantize)
    with stage as progress:
        prepared = prepare(recipe, tokenizer, read, progress)
    refuse_long(model, prepared.data)
    return Session(recipe, source, model, tokenizer, prepared)
