"""Load a kit as an ordinary transformers model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.errors import ModelError
from siftune.models.load import DTYPES, set_padding, usable_dtype
from siftune.offsite.emulator.assemble import EmulatorParts, materialise
from siftune.offsite.kit.folder import Kit, load_config, load_tokenizer, load_weights, read_kit
from siftune.offsite.kit.manifest import EMULATOR, OUTER


def load_emulator(path: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """Load a kit's emulator: it runs, generates and trains as any transformers model.

    Only the outer layers' parameters require gradients.

    Args:
        path: The kit's folder.
        dtype: float32, bfloat16, float16, or auto: the kit's, but float32 where only a processor is there that cannot
            multiply in it. The outer layers have this dtype too.

    Returns:
        The model, on the CPU and in eval mode.

    Raises:
        KitError: The kit is damaged, or not what it says.

    Example:
        >>> emulator = load_emulator(kit.path)
        >>> emulator(**batches[0]).logits.shape[:2] == batches[0]["input_ids"].shape
        True
    """
    return _load(read_kit(path), dtype)


def load_kit(kit: Kit, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load emulator and tokenizer of a kit that was read: as `load_emulator`, the tokenizer with a padding token."""
    return _load(kit, dtype), kit_tokenizer(kit)


def _load(kit: Kit, dtype: str) -> PreTrainedModel:
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    frozen, outer = load_weights(kit, EMULATOR), load_weights(kit, OUTER)
    floats = next(t.dtype for t in frozen.values() if t.is_floating_point())
    config = load_config(kit)
    # at once: by way of the frozen part's dtype, outer layers in float32 would be rounded
    target = usable_dtype(floats, config.model_type) if dtype == "auto" else getattr(torch, dtype)
    parts = EmulatorParts(config, kit.manifest.split, kit.manifest.middle, frozen, outer)
    return materialise(parts, target)


def kit_tokenizer(kit: Kit) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a kit that was read; it has a padding token."""
    tokenizer = load_tokenizer(kit)
    set_padding(tokenizer, str(kit.path))
    return tokenizer
