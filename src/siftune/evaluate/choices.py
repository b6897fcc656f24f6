"""Multiple choice by log-likelihood: which of the given continuations does the model find likeliest?

For each choice c of a prompt x the model gives Σ_t ln p(c_t | x, c_<t). Two predictions follow: the choice
of the largest sum, and the choice of the largest sum per token, which doesn't favour short choices. (The
length is counted in tokens here; some leaderboards count bytes.) Of equal scores the first choice wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from siftune.base.errors import DataError
from siftune.evaluate.perplexity import TokenRow, row_nll
from siftune.models.loss import IGNORED


@dataclass(frozen=True)
class ChoiceItem:
    """One question in token ids.

    Attributes:
        prompt_ids: The tokens that every choice follows; at least one (a model can't score a first token).
        choices_ids: The tokens of each choice, at least one token each.
        answer: Index of the right choice.
    """

    prompt_ids: Sequence[int]
    choices_ids: Sequence[Sequence[int]]
    answer: int


@dataclass(frozen=True)
class ChoiceResult:
    """Scores and predictions in the order of the items (R of them; C choices, which may differ per item).

    Attributes:
        loglik: Per item (C,) float64, the log-likelihood of each choice in nats, summed over its tokens.
        lengths: Per item (C,) int64, the number of tokens of each choice.
        answers: (R,) int64, the right choices.
    """

    loglik: list[NDArray[np.float64]]
    lengths: list[NDArray[np.int64]]
    answers: NDArray[np.int64]

    @property
    def by_sum(self) -> NDArray[np.int64]:
        """(R,) the choice with the largest log-likelihood."""
        return np.array([int(np.argmax(scores)) for scores in self.loglik], dtype=np.int64)

    @property
    def by_mean(self) -> NDArray[np.int64]:
        """(R,) the choice with the largest log-likelihood per token."""
        pairs = zip(self.loglik, self.lengths, strict=True)
        return np.array([int(np.argmax(scores / length)) for scores, length in pairs], dtype=np.int64)

    def correct(self, normalised: bool = False) -> NDArray[np.bool_]:
        """(R,) whether the prediction by sum, or by mean if `normalised`, is the answer."""
        return np.equal(self.by_mean if normalised else self.by_sum, self.answers)


def score_choices(model: nn.Module, items: Sequence[ChoiceItem], batch_size: int = 16) -> ChoiceResult:
    """Score every choice of every item.

    Args:
        model: A causal language model, PEFT-wrapped or not; it's put into eval mode and back.
        items: The questions.
        batch_size: Choices (not items) per forward pass; it changes speed and memory, not the result.

    Returns:
        Log-likelihoods, lengths and predictions in the order of `items`.

    Raises:
        DataError: An item has an empty prompt, no choices, an empty choice or an answer out of range.
    """
    for index, item in enumerate(items):
        _check(index, item)
    nll = row_nll(model, [_as_row(item, choice) for item in items for choice in item.choices_ids], batch_size)
    bounds = np.cumsum([len(item.choices_ids) for item in items])[:-1]
    return ChoiceResult(
        loglik=list(np.split(-nll.nll, bounds)) if items else [],
        lengths=list(np.split(nll.tokens, bounds)) if items else [],
        answers=np.array([item.answer for item in items], dtype=np.int64),
    )


def _as_row(item: ChoiceItem, choice: Sequence[int]) -> TokenRow:
    """Join prompt and choice; only the choice counts."""
    return [*item.prompt_ids, *choice], [*[IGNORED] * len(item.prompt_ids), *choice]


def _check(index: int, item: ChoiceItem) -> None:
    """Refuse an item that can't be scored."""
    if not item.prompt_ids:
        raise DataError(f"item {index}: the prompt has no tokens. Begin it with the tokenizer's first-token mark.")
    if not item.choices_ids or not all(item.choices_ids):
        raise DataError(f"item {index}: choices {item.choices_ids!r}. Give at least one, with a token or more each.")
    if not 0 <= item.answer < len(item.choices_ids):
        raise DataError(f"item {index}: answer {item.answer}, but the {len(item.choices_ids)} choices count from 0.")
