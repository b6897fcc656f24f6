"""A kit of a tiny model: the first two layers and the last are outer, of three others the middle one is kept."""

from pathlib import Path

import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer
from transformers import PreTrainedModel

from siftune.models.layers import find_layers
from siftune.offsite.emulator.model import LayerShape, Split, build, emulator_config, frozen_names, outer_names
from siftune.offsite.kit.folder import Kit, KitContents, write_kit
from siftune.offsite.kit.manifest import ROWS, Calibration, fingerprint

SPLIT = Split(2, 1)
OUTER = (0, 1, 3)  # the outer layers in the emulator, which has four


def base_model(dtype: torch.dtype = torch.float32, family: str = "llama") -> PreTrainedModel:
    """The model that the kit is of: six layers."""
    model = tiny(family, layers=6, vocab_size=300, eos_token_id=byte_tokenizer().eos_token_id)
    return model.to(dtype)  # type: ignore[no-any-return]


def save_kit(folder: Path, dtype: torch.dtype = torch.float32, family: str = "llama") -> Kit:
    """Write the kit; layer 2 of its emulator is layer 3 of the base."""
    base = base_model(dtype, family)
    path, state = find_layers(base).path, base.state_dict()
    middle = (LayerShape(3),)
    config = emulator_config(base.config, SPLIT, middle)
    config.dtype = dtype
    frozen = {name: state[name.replace(f"{path}.2.", f"{path}.3.")] for name in frozen_names(
        build(config, SPLIT, middle), SPLIT
    )}  # fmt: skip
    outer = {neutral: state[name] for neutral, name in outer_names(base, SPLIT).items()}
    facts = 6, fingerprint(base), Calibration(ROWS, 3, 9)
    return write_kit(folder, KitContents(config, SPLIT, middle, frozen, outer, byte_tokenizer(), *facts))
