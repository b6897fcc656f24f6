"""Similarity of prompts by the hidden states of the base model.

A text's embedding is the mean of the last hidden states over its tokens, those that the head receives. Similarity is
the cosine, and a text's similarity to a target is that to the nearest text of the target, as in RDS+ (Ivison et al.,
"Large-Scale Data Selection for Instruction Tuning", arXiv 2503.01807).

Ours: tokens have equal weights, while RDS+ gives later ones more. The mean over the pool is subtracted: without that,
texts of different tasks have cosines above 0.9. Prompts alone are compared, so that a row with a wrong completion is as
similar as one with the correct completion.

A row is of the target's task if its prompt is as similar to the nearest target prompt as 95 % of the target's own
prompts are to the nearest other one (ours). A few odd rows of the target therefore do not widen the task. Of a task
whose prompts have many forms, a few target rows lack some. If the pool has a clear gap below that limit, the rows
between are of the task as well (ours).

Shapes: R texts, T positions, H hidden size, K texts of the target.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siftune.base.numerics import widened
from siftune.data.batches import by_length
from siftune.models.loss import IGNORED, find_output_embeddings, logits_at
from siftune.models.modules import evaluating, model_device

Floats = NDArray[np.float64]
_AT_ONCE = 4096  # texts that are compared at a time


def prompt_of(ids: Sequence[int], labels: Sequence[int]) -> Sequence[int]:
    """Token ids before the first label; all of them if there is no prompt, as in a row of text.

    Example:
        >>> prompt_of([5, 6, 7], [-100, -100, 7]), prompt_of([5, 6], [-100, 6]), prompt_of([5, 6], [5, 6])
        ([5, 6], [5], [5, 6])
    """
    first = next((place for place, label in enumerate(labels) if label != IGNORED), len(ids))
    return ids[: first if first > 0 else len(ids)]


def embed(model: nn.Module, texts: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
    """Embed texts.

    Args:
        model: A causal language model, PEFT-wrapped or not; it is put into eval mode and back.
        texts: Token ids of each text, at least one.
        batch_size: Texts per forward pass.

    Raises:
        LayerError: The model has no output embeddings.

    Returns:
        (R, H), each of length 1, float32, or float64 if the model is; on the CPU.
    """
    texts_RH: Tensor | None = None
    states: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(widened(args[0].detach()))

    handle = find_output_embeddings(model).register_forward_pre_hook(keep)  # before that of logits_at: all positions
    try:
        with evaluating(model):
            for places in by_length([len(text) for text in texts], batch_size):
                lengths = torch.tensor([len(texts[place]) for place in places])
                seen_BT = torch.arange(int(lengths.max())) < lengths[:, None]
                ids_BT = torch.zeros(seen_BT.shape, dtype=torch.int64)
                ids_BT[seen_BT] = torch.tensor([token for place in places for token in texts[place]])
                first_BT = torch.zeros_like(seen_BT)
                first_BT[:, 0] = True  # the head must run, on as few positions as it can
                ids_BT, seen_BT, first_BT = (value.to(model_device(model)) for value in (ids_BT, seen_BT, first_BT))
                with logits_at(model, first_BT):
                    model(input_ids=ids_BT, attention_mask=seen_BT.long(), use_cache=False)
                states_BTH = states.pop()
                weights_BT1 = seen_BT.to(states_BTH)[:, :, None]
                mean_BH = (states_BTH * weights_BT1).sum(1) / weights_BT1.sum(1)
                mean_BH = nn.functional.normalize(mean_BH, dim=1).cpu()
                if texts_RH is None:
                    texts_RH = mean_BH.new_empty(len(texts), mean_BH.shape[1])
                texts_RH[places] = mean_BH
    finally:
        handle.remove()
    assert texts_RH is not None
    return texts_RH


def nearest(texts_RH: Tensor, target_KH: Tensor, mean_H: Tensor) -> Tensor:
    """Similarity of each text to the nearest text of the target, after the mean is subtracted; (R,), from -1 to 1.

    Args:
        texts_RH: Embeddings.
        target_KH: Those of the target.
        mean_H: Mean of the pool's: what all its texts share, such as a chat template.

    Example:
        >>> texts, target = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.6, 1.8], [2.0, 1.0]])
        >>> nearest(texts, target, torch.ones(2))
        tensor([1.0000, 0.8000])
    """
    target_KH = nn.functional.normalize(target_KH - mean_H, dim=1)
    parts = (nn.functional.normalize(part_RH - mean_H, dim=1) for part_RH in torch.split(texts_RH, _AT_ONCE))
    return torch.cat([(part_RH @ target_KH.T).amax(1) for part_RH in parts])


def nearest_other(target_KH: Tensor, mean_H: Tensor) -> Tensor:
    """Similarity of each text of the target to the nearest other one; (K,), from -1 to 1; 1 for a single text.

    Texts must differ: a text that is there twice would be its own nearest one.

    Example:
        >>> nearest_other(torch.tensor([[1.6, 1.8], [2.0, 1.0], [1.0, 2.0]]), torch.ones(2))
        tensor([0.8000, 0.6000, 0.8000])
    """
    if len(target_KH) == 1:
        return torch.ones(1)
    target_KH = nn.functional.normalize(target_KH - mean_H, dim=1)
    return (target_KH @ target_KH.T).fill_diagonal_(-torch.inf).amax(1)


_OUTSIDE = 0.05  # share of the target's own prompts that may be outside of its task (ours)
_ROUNDING = 1e-3  # of the similarity of equal prompts in different batches (ours)


def least_similarity(similar_K: Floats) -> float:
    """The similarity that 95 % of the target's own prompts reach: the lowest of a prompt of its task (ours).

    Args:
        similar_K: Similarity of each of the target's prompts to the nearest other one. At least the lowest of them is
            below the limit, so that one odd row cannot set it.

    Example:
        >>> least_similarity(np.array([0.8, 0.1, 0.9]))
        0.8
    """
    return min(float(np.quantile(similar_K, _OUTSIDE, method="higher")), 1 - _ROUNDING)


_GAP = 0.04  # width of a gap between the task and other tasks, at least (ours)
_SPACINGS = 20  # the same, in mean distances of neighbouring similarities, so that a gap in a small pool is none (ours)
_BELOW = 0.05  # share of the pool below a gap, at least: a few odd rows are no other task (ours)


def task_limit(similar_R: Floats, similar_K: Floats) -> float:
    """The lowest similarity of a row of the task: `least_similarity`, or that above the first gap below it (ours).

    Args:
        similar_R: Similarity of each prompt of the pool to the nearest of the target, at least one.
        similar_K: That of each of the target's prompts to the nearest other one.

    Example:
        >>> pool = np.concatenate([np.linspace(-0.2, 0.4, 500), np.linspace(0.6, 1.0, 500)])
        >>> task_limit(pool, np.array([0.8, 0.9, 0.9]))
        0.6
        >>> task_limit(np.linspace(-0.2, 1.0, 1000), np.array([0.8, 0.9, 0.9]))
        0.9
    """
    least = least_similarity(similar_K)
    below = np.append(np.sort(similar_R[similar_R < least]), least)
    wide = max(_GAP, _SPACINGS * float(np.ptp(similar_R)) / len(similar_R))
    gaps = np.flatnonzero(np.diff(below) >= wide)
    gaps = gaps[gaps + 1 >= _BELOW * len(similar_R)]
    return float(below[gaps[-1] + 1]) if len(gaps) else least
