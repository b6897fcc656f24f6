"""Continuing token sequences of unequal lengths in one batch."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from siftune.models.modules import model_device


def continued(model: Any, begins: Sequence[Sequence[int]], settings: GenerationConfig) -> list[list[int]]:
    """Continue each beginning; the new tokens of each, including those after its end.

    Args:
        model: transformers' own model.
        begins: Token ids, at least one each; they are padded on the left.
        settings: With `pad_token_id`; they replace the model's own meanwhile, which `generate` would merge into them.
    """
    longest, device = max(map(len, begins)), model_device(model)
    gaps = [longest - len(ids) for ids in begins]
    padded = [[settings.pad_token_id] * gap + [*ids] for gap, ids in zip(gaps, begins, strict=True)]
    seen = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    own = model.generation_config
    model.generation_config = settings
    try:
        output = model.generate(
            input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(seen, device=device)
        )
    finally:
        model.generation_config = own
    new: list[list[int]] = output[:, longest:].tolist()
    return new
