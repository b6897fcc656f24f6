"""What is tuned: an ordinary model, or what somebody hands in that stands for one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.models.source import check_source, load_model, load_tokenizer
from siftune.recipe.schema import Recipe
from siftune.train.build import refuse_all_weights


class Source(Protocol):
    """What a run needs to know of that which is tuned."""

    @property
    def usage(self) -> str | None:
        """What the model card says on the use of the result; None for what it says of any adapter."""

    def settle(self, recipe: Recipe) -> Recipe:
        """Fill in the recipe's `layers` where this decides them, before anything is loaded.

        Raises:
            InputError: The recipe asks for what cannot train here.
        """

    def load(self, dtype: str, quantize: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load model and tokenizer; `dtype` and `quantize` as for `load_model`."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone."""

    def leaves(
        self, model: nn.Module, privacy: Mapping[str, Any] | None = None
    ) -> Mapping[str, Callable[[Path], None]]:
        """What a run on it leaves besides an adapter: name of a subfolder of the run -> what writes that folder.

        Where there is any, it stands for layers that were tuned themselves: these are not saved once more. `privacy` is
        what a private run says of itself; see `methods.dp.accounting.statement`.
        """


@dataclass(frozen=True)
class ModelSource:
    """An ordinary model."""

    name: str  # a folder, a hub id or smollm2
    usage: str | None = None

    def settle(self, recipe: Recipe) -> Recipe:
        """Leave the recipe as it is; see `refuse_all_weights` and `check_source` for what is refused."""
        refuse_all_weights(recipe)
        check_source(self.name)
        return recipe

    def load(self, dtype: str, quantize: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load it by `load_model`."""
        return load_model(self.name, dtype, quantize=quantize)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load it by `load_tokenizer`."""
        return load_tokenizer(self.name)

    def leaves(
        self, model: nn.Module, privacy: Mapping[str, Any] | None = None
    ) -> Mapping[str, Callable[[Path], None]]:
        """Nothing: the adapter, or the layers that were tuned themselves, say it all."""
        return {}
