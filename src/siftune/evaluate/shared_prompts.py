"""Log-likelihoods of choices that follow one prompt, which is run once for all of them.

    prompt     x_1 … x_{P−1}            one row for each question, whose keys and values are kept
    choice c   x_P, c_1 … c_{n−1}       one row for each choice, which goes on from them

The same sums as with the prompt before every choice, up to rounding. Rows are padded on the right: padding on the left
sees nothing, which some families answer with NaN. A window of attention would count that padding, so it must hold all
of a batch; and models that keep anything else of the past than each layer's keys and values (Mamba's states) have no
such form here. Whether the two forms agree is tried on two questions before the others are asked.

Shapes: B questions of a batch, P positions of prompts, C choices of all of them, S positions of choices.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from siftune.evaluate.batching import by_length, model_device
from siftune.evaluate.perplexity import row_nll, row_sums
from siftune.models.loss import IGNORED, logits_at
from siftune.models.modes import evaluating

logger = logging.getLogger(__name__)

Ids = Sequence[int]

_KEPT = {DynamicLayer, DynamicSlidingWindowLayer}  # caches of keys and values

# by how much the forms may differ, relative to 1 + nll, because they round in other places
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Asked:
    """A prompt, and what may follow it.

    Attributes:
        prompt_ids: At least two tokens.
        choices_ids: At least one token each.
    """

    prompt_ids: Ids
    choices_ids: Sequence[Ids]


@dataclass(frozen=True)
class _Past:
    """What is kept of a batch of prompts.

    Attributes:
        cache: Keys and values.
        seen_BP: 1 at real tokens, 0 at padding.
    """

    cache: DynamicCache
    seen_BP: Tensor


def shared_nll(model: nn.Module, questions: Sequence[Asked], batch_size: int) -> list[NDArray[np.float64]] | None:
    """Negative log-likelihood of every choice, in nats.

    Args:
        model: A causal language model, PEFT-wrapped or not; it's put into eval mode and back.
        questions: At least one.
        batch_size: Choices per forward pass, more where a question has more.

    Returns:
        Per question (C,) float64; None where the model has no such form, or it gives something else.
    """
    lengths = [len(asked.prompt_ids) for asked in questions]
    longest = max(lengths) + max(len(choice) for asked in questions for choice in asked.choices_ids)
    if not _keeps_all(model, longest):
        return None
    ends = [questions[int(np.argmin(lengths))], questions[int(np.argmax(lengths))]]
    widest = max(len(asked.choices_ids) for asked in questions)
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(questions)
    with evaluating(model):
        if not _agrees(model, ends, batch_size):
            return None
        for batch in by_length(lengths, max(1, batch_size // widest)):
            for at, nll in zip(batch, _batch_nll(model, [questions[at] for at in batch]), strict=True):
                found[at] = nll
    return found


def _keeps_all(model: nn.Module, longest: int) -> bool:
    """Whether of so many tokens the model keeps all keys and values, and nothing else."""
    layers = _empty_cache(model).layers
    windows = [getattr(layer, "sliding_window", None) or longest for layer in layers]
    kinds = {type(layer) for layer in layers}
    return _cache_name(model) is not None and kinds <= _KEPT and longest <= min(windows, default=longest)


def _empty_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def _takes(model: nn.Module) -> Collection[str]:
    """Names of what the model's forward takes: PEFT's takes anything."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return signature(inner.forward).parameters


def _cache_name(model: nn.Module) -> str | None:
    """What the model calls its cache: new versions of transformers `cache`, older ones `past_key_values`."""
    taken = _takes(model)
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def _agrees(model: nn.Module, questions: Sequence[Asked], batch_size: int) -> bool:
    """Whether this form gives what whole rows give; of the two questions one is padded as much as any."""
    found = np.concatenate(_batch_nll(model, questions))
    rows = [whole_row(asked.prompt_ids, choice) for asked in questions for choice in asked.choices_ids]
    wanted = row_nll(model, rows, batch_size).nll
    apart = float(np.max(np.abs(found - wanted) / (1 + np.abs(wanted))))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if apart <= _ROUNDING.get(dtype, 0.05):
        return True
    logger.warning("choices after a shared prompt differ by %.1e from those after their own: these are taken", apart)
    return False


def whole_row(prompt_ids: Ids, choice_ids: Ids) -> tuple[Ids, Ids]:
    """Join prompt and choice; only the choice counts."""
    return [*prompt_ids, *choice_ids], [*[IGNORED] * len(prompt_ids), *choice_ids]


def _batch_nll(model: nn.Module, questions: Sequence[Asked]) -> list[NDArray[np.float64]]:
    """Negative log-likelihood of every choice, per question."""
    past = _run_prompts(model, [asked.prompt_ids[:-1] for asked in questions])
    pairs = [(at, asked, choice) for at, asked in enumerate(questions) for choice in asked.choices_ids]
    owners_C = torch.tensor([at for at, _, _ in pairs], device=past.seen_BP.device)
    past.cache.batch_select_indices(owners_C)
    ids_CS, real_CS = _padded([[asked.prompt_ids[-1], *choice[:-1]] for _, asked, choice in pairs], owners_C.device)
    labels_CS = _padded([choice for _, _, choice in pairs], owners_C.device)[0].where(real_CS, IGNORED)
    with logits_at(model, real_CS):
        logits_NV = _run(model, past.cache, ids_CS, torch.cat([past.seen_BP[owners_C], real_CS.long()], 1)).logits[0]
    bounds = np.cumsum([len(asked.choices_ids) for asked in questions])[:-1]
    return list(np.split(row_sums(logits_NV, labels_CS), bounds))


def _run_prompts(model: nn.Module, prompts_ids: Sequence[Ids]) -> _Past:
    """Run prompts, of which no logits are needed."""
    cache, (ids_BP, real_BP) = _empty_cache(model), _padded(prompts_ids, model_device(model))
    with logits_at(model, torch.zeros_like(real_BP)):
        _run(model, cache, ids_BP, real_BP.long())
    return _Past(cache, real_BP.long())


def _run(model: nn.Module, cache: DynamicCache, ids_BT: Tensor, seen_BA: Tensor) -> Any:
    """Run tokens after what the cache holds; (B, A) `seen_BA` is of both."""
    known: dict[str, Any] = {str(_cache_name(model)): cache}
    if "position_ids" in _takes(model):
        # padding has no place of its own: after a long prompt it would be beyond the model's window
        known["position_ids"] = ((seen_BA.cumsum(1) - 1) * seen_BA)[:, -ids_BT.shape[1] :]
    return model(input_ids=ids_BT, attention_mask=seen_BA, use_cache=True, **known)


def _padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad lists of ids on the right; (B, T) int64, and bool, false on padding."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rows], device=device)
    lengths_B = torch.tensor([len(ids) for ids in rows], device=device)
    return ids_BT, torch.arange(longest, device=device) < lengths_B[:, None]
