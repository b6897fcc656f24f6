"""What every metric needs around its forward passes: batches of like length, device and window."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices of similar length, the longest first so that a lack of memory shows at once.

    Raises:
        ValueError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def model_device(model: nn.Module) -> torch.device:
    """Return the device that the model's input ids belong on."""
    return next(model.parameters()).device


def model_window(model: Any) -> int | None:
    """Return the number of positions that the model was built for, or None if its config doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
