"""Log-likelihood of rows: perplexity of completions, and multiple choice.

A row is a pair (input_ids, labels) of equally long lists. `labels` repeats the token ids that count and holds -100
elsewhere, as in training. Position t is predicted from the positions before t, so a label at position 0 does not count.

    nll_i = −Σ_{t: label} ln p(x_t | x_<t)        ppl = exp(Σ_i nll_i / Σ_i tokens_i)

Multiple choice: for each choice c of a prompt x the model gives Σ_t ln p(c_t | x, c_<t). Two predictions follow: the
choice of the largest sum, and the choice of the largest sum per token, which does not favour short choices. (The length
is counted in tokens here; some leaderboards count bytes.) Of equal scores the first choice wins.

Shapes: B rows of a batch, T positions, N predicted positions of a batch, V vocabulary size, R all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siftune.base.errors import DataError
from siftune.base.files import Progress
from siftune.data.batches import by_length
from siftune.models.loss import IGNORED, cross_entropy, logits_at
from siftune.models.modules import evaluating, model_device

TokenRow = tuple[Sequence[int], Sequence[int]]
# layers of a cache that keep keys and values alone; the last kind, of layers that use another layer's, keeps nothing
_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


@dataclass(frozen=True)
class PerplexityResult:
    """Negative log-likelihood per row, in nats.

    Attributes:
        nll: (R,) float64, summed over the row's label tokens.
        tokens: (R,) int64, number of label tokens of the row.
    """

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]


def perplexity(
    model: nn.Module, rows: Sequence[TokenRow], batch_size: int = 16, progress: Progress | None = None
) -> PerplexityResult:
    """Compute the negative log-likelihood of the label tokens.

    Args:
        model: A causal language model, PEFT-wrapped or not; it's put into eval mode and back.
        rows: Pairs (input_ids, labels) of equally long lists of token ids; labels are -100 at tokens that do not count.
        batch_size: Rows per forward pass; it changes speed and memory, and the result by rounding alone.
        progress: Receives the number of scored rows.

    Returns:
        The negative log-likelihood and number of tokens per row, in the order of `rows`.

    Raises:
        DataError: A row's lists differ in length, or no row has a label that can be predicted.
    """
    result = row_nll(model, rows, batch_size, progress)
    if not result.tokens.sum():
        raise DataError(
            f"none of the {len(rows)} rows has a label token after its first, so there is no perplexity: "
            "give rows with a completion"
        )
    return result


def row_nll(
    model: nn.Module,
    rows: Sequence[TokenRow],
    batch_size: int = 16,
    progress: Progress | None = None,
    stage: str = "scoring rows",
) -> PerplexityResult:
    """Compute the negative log-likelihood of each row's label tokens; 0 for a row without any.

    Arguments and errors are those of `perplexity`, but rows without labels are accepted. `stage` is the name of the
    progress.
    """
    tokens = np.array([_count_labels(i, *row) for i, row in enumerate(rows)], dtype=np.int64)
    nll = np.zeros(len(rows), dtype=np.float64)
    labelled, done = np.flatnonzero(tokens).tolist(), 0
    report = progress or (lambda *_: None)
    report(stage, 0, len(labelled))
    with evaluating(model):
        for batch in by_length([len(rows[i][0]) for i in labelled], batch_size):
            chosen = [labelled[i] for i in batch]
            nll[chosen] = _batch_nll(model, [rows[i] for i in chosen])
            done += len(chosen)
            report(stage, done, len(labelled))
    return PerplexityResult(nll, tokens)


def shared_nll(
    model: nn.Module,
    rows: Sequence[TokenRow],
    batch_size: int = 16,
    progress: Progress | None = None,
    stage: str = "scoring rows",
) -> PerplexityResult:
    """Compute what `row_nll` computes, but read a prompt that several rows have once.

    A prompt is what precedes a row's first label. If each row has a prompt of its own, `row_nll` is faster. It computes
    the rows of models that keep more than keys and values, such as Mamba's recurrent state.

    Arguments and errors are those of `row_nll`.
    """
    tokens = np.array([_count_labels(i, *row) for i, row in enumerate(rows)], dtype=np.int64)
    nll = np.zeros(len(rows), dtype=np.float64)
    labelled, done = np.flatnonzero(tokens).tolist(), 0
    prompts: dict[tuple[int, ...], list[int]] = {}
    for number in labelled:
        ids, labels = rows[number]
        prompts.setdefault(tuple(ids[: _first_label(labels)]), []).append(number)
    parts = [
        (prompt, numbers[start : start + batch_size])
        for prompt, numbers in prompts.items()
        for start in range(0, len(numbers), batch_size)
    ]
    parts.sort(key=lambda part: len(part[0]))
    report = progress or (lambda *_: None)
    report(stage, 0, len(labelled))
    with evaluating(model):
        while parts:
            batch = [parts.pop()]  # the longest first, so that too little memory shows at once
            while parts and sum(len(numbers) for _, numbers in (*batch, parts[-1])) <= batch_size:
                batch.append(parts.pop())
            values = _shared_batch_nll(model, batch, rows)
            if values is None:
                return row_nll(model, rows, batch_size, progress, stage)
            chosen = [number for _, numbers in batch for number in numbers]
            nll[chosen] = values
            done += len(chosen)
            report(stage, done, len(labelled))
    return PerplexityResult(nll, tokens)


def _first_label(labels: Sequence[int]) -> int:
    return next(place for place in range(1, len(labels)) if labels[place] != IGNORED)


def _shared_batch_nll(
    model: nn.Module, batch: Sequence[tuple[Sequence[int], Sequence[int]]], rows: Sequence[TokenRow]
) -> NDArray[np.float64] | None:
    """Negative log-likelihood of the rows of some prompts: (B,) float64, prompt by prompt.

    The prompts are read first, padded on the left, so that their last logits are those of each row's first label. Then
    each row continues its prompt's keys and values; None if the model keeps anything else. P: prompts.
    """
    device = model_device(model)
    longest = max(len(prompt) for prompt, _ in batch)
    ids_PT = torch.tensor([[0] * (longest - len(prompt)) + [*prompt] for prompt, _ in batch], device=device)
    lengths_P = torch.tensor([len(prompt) for prompt, _ in batch], device=device)
    seen_PT = (torch.arange(longest, device=device) >= longest - lengths_P[:, None]).long()
    last_PT = torch.zeros_like(seen_PT, dtype=torch.bool)
    last_PT[:, -1] = True
    position_PT = (seen_PT.cumsum(1) - 1).clamp(min=0)
    with logits_at(model, last_PT):
        output = model(input_ids=ids_PT, attention_mask=seen_PT, position_ids=position_PT, use_cache=True)
    name = "cache" if "cache" in output else "past_key_values"  # in older releases of transformers
    cache: Any = output.get(name)
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if not kinds or kinds - _KEYS_AND_VALUES:
        return None

    prompt_B = torch.tensor([at for at, (_, numbers) in enumerate(batch) for _ in numbers], device=device)
    answers = [[part[len(prompt) :] for part in rows[number]] for prompt, numbers in batch for number in numbers]
    ids_BS = _pad([ids for ids, _ in answers], 0).to(device)
    labels_BS = _pad([labels for _, labels in answers], IGNORED).to(device)
    first_PV = output.logits[0]
    sums_B = cross_entropy(first_PV[prompt_B.to(first_PV.device)], labels_BS[:, 0].to(first_PV.device)).cpu().double()
    mask_BS = labels_BS[:, 1:] != IGNORED
    if mask_BS.any():
        cache.batch_select_indices(prompt_B)
        position_BS = lengths_P[prompt_B, None] + torch.arange(ids_BS.shape[1] - 1, device=device)
        with logits_at(model, mask_BS):
            logits_NV = model(
                input_ids=ids_BS[:, :-1],
                attention_mask=torch.cat([seen_PT[prompt_B], torch.ones_like(position_BS)], 1),
                position_ids=position_BS,
                use_cache=True,
                **{name: cache},
            ).logits[0]
        nll_N = cross_entropy(logits_NV, labels_BS[:, 1:][mask_BS].to(logits_NV.device)).cpu().double()
        sums_B.index_add_(0, mask_BS.nonzero()[:, 0].cpu(), nll_N)
    return np.asarray(sums_B.numpy())


def _count_labels(index: int, ids: Sequence[int], labels: Sequence[int]) -> int:
    """Count the labels that can be predicted: all but the one at position 0."""
    if len(ids) != len(labels):
        raise DataError(f"row {index}: {len(ids)} input ids but {len(labels)} labels; give lists of one length")
    return sum(label != IGNORED for label in labels[1:])


def _batch_nll(model: nn.Module, rows: Sequence[TokenRow]) -> NDArray[np.float64]:
    """Negative log-likelihood per row of one batch: (B,) float64."""
    device = model_device(model)
    # Position t predicts token t + 1: drop the last input and the first label instead of shifting logits.
    ids_BT = _pad([ids[:-1] for ids, _ in rows], 0).to(device)
    labels_BT = _pad([labels[1:] for _, labels in rows], IGNORED).to(device)
    seen_BT = _pad([[1] * (len(ids) - 1) for ids, _ in rows], 0).to(device)
    mask_BT = labels_BT != IGNORED
    with logits_at(model, mask_BT):
        logits_NV = model(input_ids=ids_BT, attention_mask=seen_BT, use_cache=False).logits[0]
    nll_N = cross_entropy(logits_NV, labels_BT[mask_BT].to(logits_NV.device)).cpu().double()
    row_N = mask_BT.nonzero()[:, 0].cpu()
    sums_B = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_N, nll_N)
    return np.asarray(sums_B.numpy())


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Right-pad lists of ids to one length: (B, T) int64."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


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


def score_choices(
    model: nn.Module, items: Sequence[ChoiceItem], batch_size: int = 16, progress: Progress | None = None
) -> ChoiceResult:
    """Score every choice of every item.

    Args:
        model: A causal language model, PEFT-wrapped or not; it's put into eval mode and back.
        items: The questions.
        batch_size: Choices (not items) per forward pass; it changes speed and memory, and the result by rounding alone.
        progress: Receives the number of scored choices.

    Returns:
        Log-likelihoods, lengths and predictions in the order of `items`.
    """
    rows = [_as_row(item, choice) for item in items for choice in item.choices_ids]
    nll = row_nll(model, rows, batch_size, progress, "scoring choices")
    bounds = np.cumsum([len(item.choices_ids) for item in items])[:-1]
    return ChoiceResult(
        loglik=list(np.split(-nll.nll, bounds)) if items else [],
        lengths=list(np.split(nll.tokens, bounds)) if items else [],
        answers=np.array([item.answer for item in items], dtype=np.int64),
    )


def _as_row(item: ChoiceItem, choice: Sequence[int]) -> TokenRow:
    """Join prompt and choice; only the choice counts."""
    return [*item.prompt_ids, *choice], [*[IGNORED] * len(item.prompt_ids), *choice]
