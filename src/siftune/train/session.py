"""What a training starts from: settings, rows, model and tokens, checked in the order of the cost of a check.

    settled        settings alone: contradictions, packages of trackers, an adapter to start from, the model's source
    open_session   rows as read; then the model, which may have to be fetched; then their tokens

`siftune train`, its dry run and sweeps of rates begin with these functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.ranks import first_rank_first, from_first
from siftune.base.stages import stages
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
    recipe = from_first(lambda: adopted(recipe))
    check(recipe)  # also for the type of an adapter that was trained before
    recipe = from_first(lambda: resolve_recipe(recipe))
    source = source_of(recipe.model)
    return source.settle(recipe), source


def open_session(recipe: Recipe, source: Source, console: Console, read: Read | None = None) -> Session:
    """Read the rows of a settled recipe, load its model, and tokenise the rows.

    Args:
        recipe: As of `settled`.
        source: The model's source.
        console: Console for progress.
        read: The rows, which are then not read again.

    Raises:
        InputError: Rows or model cannot be used.
    """
    read = read or read_rows(recipe)
    refuse_read(recipe, read, source.tokenizer)
    with first_rank_first():
        model, tokenizer = source.load(recipe.dtype, recipe.quantize)
    with stages(console) as progress:
        prepared = prepare(recipe, tokenizer, read, progress)
    refuse_long(model, prepared.data)
    return Session(recipe, source, model, tokenizer, prepared)
