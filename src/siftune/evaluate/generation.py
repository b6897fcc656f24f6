"""Greedy generation, and exact match of its texts with answers."""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import GenerationConfig

from siftune.base.errors import AdapterError
from siftune.base.files import Progress
from siftune.data.batches import by_length
from siftune.models.generate import continued
from siftune.models.loss import contiguous_head_input
from siftune.models.modules import evaluating, inner_model


def greedy(
    model: nn.Module,
    prompts_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    pad_id: int = 0,
    eos_ids: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continue each prompt with the likeliest token at each step.

    The model's own generation settings (sampling, penalties, beams) are replaced meanwhile, so the result is
    the arg-max of the logits.

    Args:
        model: A causal language model, PEFT-wrapped or not; it's put into eval mode and back.
        prompts_ids: Token ids of each prompt, at least one token each, with room for the new tokens in the model's
            window.
        max_new_tokens: Largest number of new tokens.
        batch_size: Prompts per pass, taken from prompts of similar length; they're padded on the left.
        pad_id: Token id for the padding; any valid id does, since it's masked.
        eos_ids: Token ids that end a continuation; without any, all are `max_new_tokens` long.
        progress: Receives the number of continued prompts; those of a batch count by their share of the new tokens.

    Returns:
        The new tokens per prompt, in the order of `prompts_ids`, without the one that ended it.

    Raises:
        AdapterError: The adapter adds virtual tokens.
    """
    inner = _generator(model)
    outputs: list[list[int]] = [[] for _ in prompts_ids]
    done = 0
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids) or None,
    )
    with evaluating(model), contiguous_head_input(inner):
        for batch in by_length([len(ids) for ids in prompts_ids], batch_size):

            def report(steps: int, before: int = done, here: int = len(batch)) -> None:
                if progress is not None:
                    progress("writing answers", before + here * steps // max_new_tokens, len(prompts_ids))

            report(0)
            texts = continued(inner, [prompts_ids[i] for i in batch], settings, report)
            report(max_new_tokens)
            done += len(batch)
            for i, ids in zip(batch, texts, strict=True):
                outputs[i] = _until_end(ids, eos_ids)
    return outputs


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> NDArray[np.bool_]:
    """Compare texts after `normalise`.

    Returns:
        (R,) bool.

    Raises:
        ValueError: There are not as many predictions as answers.
    """
    pairs = zip(predictions, answers, strict=True)
    return np.array([normalise(written) == normalise(right) for written, right in pairs], dtype=np.bool_)


def normalise(text: str) -> str:
    """Strip white space at both ends, fold case, and drop one full stop at the end.

    Everything else counts: inner spaces, other punctuation, "7" against "seven", "1,000" against "1000".
    """
    return text.strip().casefold().removesuffix(".").rstrip(string.whitespace)


def _generator(model: nn.Module) -> Any:
    """Return the transformers model itself: PEFT puts LoRA layers inside it and only passes `generate` on."""
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise AdapterError(
            f"a {config.peft_type} adapter adds virtual tokens, which generation here does not support: "
            "use LoRA or DoRA"
        )
    return inner_model(model)


def _until_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Cut before the first end token."""
    ends = [position for position, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0]] if ends else ids
