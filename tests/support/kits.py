"""A small kit with random weights, made without the rest of the pipeline."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer
from torch import Tensor

from siftune.models.families import family_of
from siftune.offsite.emulator.model import LayerShape, Split, build, emulator_config, frozen_names, outer_names
from siftune.offsite.exchange.returned import write_return
from siftune.offsite.kit.folder import Kit, KitContents, write_kit
from siftune.offsite.kit.manifest import ROWS, Calibration, canonical
from siftune.offsite.kit.tensors import TensorSpec, open_tensors

VOCAB = 320  # the byte tokenizer has 260 tokens
DEPTH = 5
KINDS = {"gemma3_text": "gemma3"}  # transformers' word -> the one in tiny.py


def contents(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> KitContents:
    """Of a base with five layers: of the middle, the first and the last are alike, the second has biases.

    Args:
        family: Model type.
        dtype: Of the frozen tensors; the outer layers' are float32.
        overrides: Settings of the base's config.
    """
    base = tiny(KINDS.get(family, family), DEPTH, vocab_size=VOCAB, **overrides)
    table, split = family_of(base.config), Split(1, 1)
    ranks = {path: 3 + place for place, path in enumerate(table.attention)}
    middle = (
        LayerShape(1, ranks, channels=10),
        LayerShape(2, {table.attention[0]: 4}, channels=12),
        LayerShape(3, ranks, channels=10),
    )
    config = emulator_config(base.config, split, middle)
    emulator = build(config, split, middle)
    state, generator = emulator.state_dict(), torch.Generator().manual_seed(0)

    def draw(name: str, kind: torch.dtype) -> Tensor:
        return torch.randn(state[name].shape, generator=generator).to(kind)

    return KitContents(
        config=config,
        tokenizer=byte_tokenizer(),
        split=split,
        middle=middle,
        depth=DEPTH,
        fingerprint=hashlib.sha256(b"base").hexdigest(),
        calibration=Calibration(ROWS, 3, 9),
        frozen={name: draw(name, dtype) for name in frozen_names(emulator, split)},
        outer={neutral: draw(name, torch.float32) for neutral, name in outer_names(emulator, split).items()},
    )


def small_kit(folder: Path, family: str = "llama", **overrides: Any) -> Kit:
    """Write a kit."""
    return write_kit(folder, contents(family, **overrides))


def tuned(kit: Kit, seed: int = 1) -> dict[str, Tensor]:
    """Tensors for a return."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in kit.manifest.outer.items()}


def small_return(folder: Path, kit: Kit) -> Path:
    """Write a return."""
    return write_return(folder, tuned(kit), kit)


def copied(source: Path, target: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(source, target, dirs_exist_ok=True))


def read_json(path: Path) -> Any:
    """Plain JSON."""
    return json.loads(path.read_text())


def repair(folder: Path) -> None:
    """Do as a forger would: bring sizes and hashes in the manifest in line with the files."""
    manifest = read_json(folder / "manifest.json")
    for name in manifest["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(canonical(manifest))


def edit(folder: Path, name: str, change: Any) -> None:
    """Change a JSON file of a kit or return with `change(value) -> value or None`, and repair the manifest."""
    value = read_json(folder / name)
    changed = change(value)
    (folder / name).write_bytes(canonical(value if changed is None else changed))
    repair(folder)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """The header of a tensor file, read as untrusted."""
    with open_tensors(path) as file:
        return file.specs


def write_header(path: Path, header: Any, data: bytes) -> None:
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
