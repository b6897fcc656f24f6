"""What a kit is, from its shapes and sizes alone."""

from typing import Any

import torch

from siftune.models.layers import find_layers
from siftune.offsite.emulator.model import build
from siftune.offsite.kit.folder import Kit, load_config
from siftune.offsite.kit.manifest import EMULATOR, OUTER
from siftune.offsite.kit.tensors import DTYPES


def facts(kit: Kit) -> dict[str, Any]:
    """What a kit is, in plain types.

    `base_mb` is what the whole base model would take in the kit's dtype; `middle.kept` the share of the parameters of
    the base's middle that the emulator has.
    """
    manifest = kit.manifest
    model = build(load_config(kit), manifest.split, manifest.middle)
    layers = find_layers(model).layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    middle = manifest.split.middle(len(layers))
    own = sum(sizes[number] for number, shape in zip(middle, manifest.middle, strict=True) if shape.same_as is None)
    base = len(manifest.split.middle(manifest.depth)) * sizes[manifest.split.outer(len(layers))[0]]
    rest = sum(p.numel() for p in model.parameters()) - sum(sizes[number] for number in middle)
    outer, dtype = manifest.outer, str(kit.config["dtype"])
    outer_dtype = DTYPES[next(iter(outer.values())).dtype]
    return {
        "kit": kit.path,
        "digest": kit.digest,
        "model_type": manifest.model_type,
        "layers": manifest.depth,
        "split": {"first": manifest.split.first, "last": manifest.split.last},
        "middle": {"layers": len(middle), "of": len(manifest.split.middle(manifest.depth)), "kept": own / base},
        "dtype": dtype,
        "emulator_mb": manifest.files[EMULATOR].bytes / 1e6,
        "outer_mb": manifest.files[OUTER].bytes / 1e6,
        "base_mb": (rest + base) * getattr(torch, dtype).itemsize / 1e6,
        "outer": {"tensors": len(outer), "dtype": str(outer_dtype).removeprefix("torch.")},
        "signature": "valid" if kit.verified else "not checked" if kit.signed else "none",
    }
