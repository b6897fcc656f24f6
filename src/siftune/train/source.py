"""Sources of a model to tune: an ordinary model, or what a caller provides instead, such as a kit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.models.load import load_model, load_tokenizer
from siftune.models.source import check_source
from siftune.recipe.checks import refuse_all_weights
from siftune.recipe.schema import Recipe


class Source(Protocol):
    """A model to tune: an ordinary one, or what a caller provides instead."""

    @property
    def usage(self) -> str | None:
        """Usage section of the model card; None for the standard one."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Hashes, by name, that must be the same when a run resumes; empty for an ordinary model."""

    def settle(self, recipe: Recipe) -> Recipe:
        """Fill in the recipe's `layers` if the source determines them, before anything is loaded.

        Raises:
            InputError: The recipe cannot train this source.
        """

    def load(self, dtype: str, quantize: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load model and tokenizer; arguments as for `load_model`."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone."""

    def check_tuned(self, model: nn.Module) -> None:
        """Check, before training, that `returned` would hold all that trains in the model.

        Raises:
            InputError: It would not.
        """

    def returned(
        self, model: nn.Module, privacy: Mapping[str, Any] | None = None
    ) -> Mapping[str, Callable[[Path], None]]:
        """Further results of a run: name of a subfolder of the run -> its writer.

        They replace the weights of tuned layers. `privacy` is the guarantee of a private run; see
        `methods.dp.accounting.statement`.
        """


@dataclass(frozen=True)
class ModelSource:
    """An ordinary model."""

    name: str  # a folder, a hub id or smollm2
    usage: str | None = None

    @property
    def identity(self) -> Mapping[str, str]:
        """Empty: weights of ordinary models are not hashed."""
        return {}

    def settle(self, recipe: Recipe) -> Recipe:
        """Check model name and recipe."""
        refuse_all_weights(recipe)
        check_source(self.name)
        return recipe

    def load(self, dtype: str, quantize: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load model and tokenizer."""
        return load_model(self.name, dtype, quantize=quantize)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(self.name)

    def check_tuned(self, model: nn.Module) -> None:
        """Check nothing: all that trains is saved."""

    def returned(
        self, model: nn.Module, privacy: Mapping[str, Any] | None = None
    ) -> Mapping[str, Callable[[Path], None]]:
        """No further results."""
        return {}
