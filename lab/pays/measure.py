"""The loss of every row's tokens in one forward pass, and what is measured with it on held-out rows.

Shapes: B rows, T positions, N labelled positions of a batch in row-major order, R all rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siftune.data.batches import Collator, by_length
from siftune.data.read import load_rows
from siftune.data.tokens import tokenize_rows
from siftune.models.attention import short_rows
from siftune.models.loss import label_positions, logits_at, next_labels
from siftune.models.modules import evaluating, model_device
from siftune.recipe.schema import Recipe

_BATCH = 64
Floats = NDArray[np.float64]


def token_losses(
    model: nn.Module, batch: Mapping[str, Tensor], letters: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every labelled token, without gradients.

    Args:
        model: A causal language model.
        batch: (B, T) `input_ids`, `attention_mask` and `labels`.
        letters: Tokens of the letters that options have, if answers are letters.

    Returns:
        nll (N,) float32 or float64, right (N,) bool: the token is the most likely one, or of all letters if letters are
        given; row (N,) int64.
    """
    mask_BT = label_positions(batch["labels"])
    with evaluating(model), logits_at(model, mask_BT):
        logits_NV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[
            0
        ]
    targets_N = next_labels(batch["labels"])
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    nll_N = nn.functional.cross_entropy(wide_NV, targets_N, reduction="none")
    right_N = wide_NV.argmax(1) == targets_N
    if letters:
        letters_L = torch.tensor(letters, device=targets_N.device)
        likeliest_N = letters_L[wide_NV[:, letters_L].argmax(1)]
        right_N = (likeliest_N == targets_N) | ~torch.isin(targets_N, letters_L)  # the end of the answer is no letter
    return nll_N, right_N, mask_BT.nonzero()[:, 0]


def measure_rows(
    model: nn.Module, data: Any, collate: Any, batch_size: int = _BATCH, letters: Sequence[int] = ()
) -> dict[str, list[float]]:
    """Measure held-out rows with the right answer given, so that nothing is generated.

    Args:
        model: A causal language model.
        data: Tokenised rows.
        collate: Makes a batch of rows.
        batch_size: Rows per forward pass.
        letters: As in `token_losses`.

    Returns:
        Per row, in their order: `right`, 1 where every token of the answer with its end is the most likely one, or the
        letter is the most likely letter; `nll`, of the answer with its end, in nats; `tokens`, how many these are.
    """
    found: dict[str, Floats] = {name: np.zeros(len(data)) for name in ("right", "nll", "tokens")}
    for places in by_length(list(data["length"]), batch_size):
        batch = {k: v.to(model_device(model)) for k, v in collate([data[place] for place in places]).items()}
        nll_N, right_N, row_N = (part.cpu() for part in token_losses(model, batch, letters))
        wide = torch.zeros(len(places), dtype=torch.float64)
        counts_B = wide.index_add(0, row_N, torch.ones(len(row_N), dtype=torch.float64))
        found["nll"][places] = wide.index_add(0, row_N, nll_N.double()).numpy()
        found["tokens"][places] = counts_B.numpy()
        found["right"][places] = (wide.index_add(0, row_N, right_N.double()) == counts_B).numpy()
    return {
        "right": found["right"].astype(int).tolist(),
        "nll": np.round(found["nll"], 5).tolist(),
        "tokens": found["tokens"].astype(int).tolist(),
    }


def tokens_of_file(file: str, tokenizer: Any, template: str) -> Any:
    """Tokenised rows of a file, cut at the default of `--max-length`."""
    return tokenize_rows(load_rows(file), tokenizer, Recipe.max_length, template)


def measure_file(
    model: nn.Module, tokenizer: Any, file: str, template: str, letters: str = ""
) -> dict[str, list[float]]:
    """Measure the rows of a file, as `measure_rows`; `letters` are those of the options."""
    data, collate = tokens_of_file(file, tokenizer, template), Collator(tokenizer.pad_token_id)
    tokens = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in letters]
    with short_rows():
        return measure_rows(model, data, collate, letters=tokens)


def nats_per_token(measured: Mapping[str, Sequence[float]]) -> float:
    """Σ nll / Σ tokens."""
    return float(np.sum(measured["nll"]) / np.sum(measured["tokens"]))
