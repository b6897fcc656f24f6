"""Kits on disk: what the owner of a model hands out, written in one move and read as untrusted data.

    KIT/
      manifest.json            the files and shapes: see manifest.py
      config.json              the emulator's, see config.py
      tokenizer.json, tokenizer_config.json, chat_template.jinja     see tokenizer.py
      emulator.safetensors     everything frozen
      adapter.safetensors      the layers to tune, under names that do not depend on the depth

`read_kit` checks all that can be checked without allocating a tensor. A kit runs no code and writes nothing outside its
folder. Nobody can see from a kit whether its weights, which are finite and no larger than 65504, are the base's: it is
trusted like its owner.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siftune.base.errors import KitError
from siftune.models.layers import find_layers
from siftune.offsite.emulator.assemble import EmulatorParts
from siftune.offsite.emulator.model import build
from siftune.offsite.kit import config, tokenizer
from siftune.offsite.kit.config import CONFIG
from siftune.offsite.kit.manifest import (
    EMULATOR,
    LIMITS,
    MANIFEST,
    OUTER,
    Calibration,
    FileSpec,
    Manifest,
    canonical,
    dump_manifest,
    parse_manifest,
)
from siftune.offsite.kit.strict import fresh_folder, list_files, naming, parse_json, read_bytes, sha256_of
from siftune.offsite.kit.tensors import DTYPES, check_specs, open_tensors, spec_of, write_tensors


@dataclass(frozen=True)
class KitContents(EmulatorParts):
    """Contents of a kit: an emulator, of whose config `config.scrub` lets some settings through, and these parts."""

    tokenizer: PreTrainedTokenizerBase
    depth: int  # decoder layers of the base
    fingerprint: str  # of the base's weights
    calibration: Calibration


@dataclass(frozen=True)
class Kit:
    """A kit that has passed every check.

    Attributes:
        path: Its folder.
        manifest: Its manifest.
        digest: SHA-256 of the bytes of manifest.json, in hexadecimal: the kit's name in returns.
        config: Its config.json.
    """

    path: Path
    manifest: Manifest
    digest: str
    config: dict[str, Any]


def is_kit(path: str | Path) -> bool:
    """Whether a path looks like a kit: a folder with a manifest.json that says so, be it sound or not."""
    manifest = Path(path) / MANIFEST
    try:
        return manifest.is_file() and b'"siftune_kit"' in read_bytes(manifest, LIMITS[MANIFEST])
    except KitError:
        return False


def write_kit(out: str | Path, contents: KitContents) -> Kit:
    """Write a kit, beside its place and then in one move, and read it again as a data owner would.

    Args:
        out: Its folder; missing or empty.
        contents: What goes into it.

    Raises:
        ModelError: `out` is in use.
        KitError: It cannot be written to, or the contents do not fit together or hold NaN. Nothing is left behind.
    """
    with fresh_folder(out) as folder:
        _fill(folder, contents)
        kit = read_kit(folder)
    return dataclasses.replace(kit, path=Path(out))


def _fill(folder: Path, contents: KitContents) -> None:
    """Write every file: what may be refused first, the manifest last, since it has all hashes."""
    settings = config.scrub(contents.config, _one_dtype(contents.frozen.values()))
    small = {CONFIG: canonical(settings), **tokenizer.tokenizer_files(contents.tokenizer)}
    for name, data in small.items():
        (folder / name).write_bytes(data)
    write_tensors(folder / EMULATOR, contents.frozen)
    write_tensors(folder / OUTER, contents.outer)
    names = sorted(path.name for path in folder.iterdir())
    manifest = Manifest(
        model_type=contents.config.model_type,
        depth=contents.depth,
        fingerprint=contents.fingerprint,
        calibration=contents.calibration,
        split=contents.split,
        middle=contents.middle,
        outer={name: spec_of(contents.outer[name]) for name in contents.outer},
        files={name: FileSpec((folder / name).stat().st_size, sha256_of(folder / name)) for name in names},
    )
    (folder / MANIFEST).write_bytes(dump_manifest(manifest))


def _one_dtype(tensors: Iterable[Tensor]) -> str:
    dtypes = {spec.dtype for spec in map(spec_of, tensors)}  # which lets go of each before the next
    if len(dtypes) != 1:
        raise KitError(f"the frozen tensors have the dtypes {', '.join(sorted(dtypes))}; bring them to one")
    return dtypes.pop()


def read_kit(path: str | Path) -> Kit:
    """Check a kit, completely, and allocate none of its tensors.

    In this order: which files there are; every field of the manifest; sizes; the config; the tokenizer; the tensor
    files: headers, against the manifest and against the model that config and manifest describe, hashes, and numbers.
    What is loaded later is compared with the same hashes.

    Args:
        path: Its folder, which may be reached by a link.

    Raises:
        KitError: Anything is out of order. The message names file and field.
    """
    folder = Path(path)
    with naming(f"kit {folder}"):
        sizes = list_files(folder, LIMITS)
        data = read_bytes(folder / MANIFEST, LIMITS[MANIFEST]) if MANIFEST in sizes else b""
        if not data:
            raise KitError(f"it has no {MANIFEST}, or an empty one")
        manifest, digest = parse_manifest(data), hashlib.sha256(data).hexdigest()
        _check_sizes(sizes, manifest)
        settings = config.check_settings(parse_json(_read_part(folder, CONFIG, manifest), CONFIG))
        frozen, outer = config.expected_specs(settings, manifest)
        model = f"the model of {CONFIG} and {MANIFEST}"
        check_specs(manifest.outer, outer, f"{MANIFEST}: adapter", model)
        tokenizer.make_tokenizer(_tokenizer_files(folder, manifest), config.make_config(settings).vocab_size)
        for name, specs in ((EMULATOR, frozen), (OUTER, outer)):
            with open_tensors(folder / name) as file:
                check_specs(file.specs, specs, name, model)
                manifest.files[name].check_hash(name, sha256_of(folder / name))
                file.check_numbers()
    return Kit(folder, manifest, digest, settings)


def _check_sizes(sizes: Mapping[str, int], manifest: Manifest) -> None:
    """Compare the folder with the manifest's table of files."""
    for name, spec in manifest.files.items():
        if name not in sizes:
            raise KitError(f"{name} is missing, but is in {MANIFEST}: files")
        spec.check_size(name, sizes[name])
    for name in sizes:
        if name not in (*manifest.files, MANIFEST):
            raise KitError(f"{name} is in it, but not in {MANIFEST}: files")


def _read_part(folder: Path, name: str, manifest: Manifest) -> bytes:
    """Read a small file once, and check what was read."""
    data = read_bytes(folder / name, LIMITS[name])
    manifest.files[name].check_hash(name, hashlib.sha256(data).hexdigest())
    return data


def _tokenizer_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    return {name: _read_part(folder, name, manifest) for name in tokenizer.FILES if name in manifest.files}


def load_config(kit: Kit) -> PreTrainedConfig:
    """Build the emulator's config of a kit that was read."""
    return config.make_config(kit.config)


def load_tokenizer(kit: Kit) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a kit that was read; the files are checked against the manifest once more.

    Unlike `AutoTokenizer` this never asks the hub.
    """
    with naming(f"kit {kit.path}"):
        return tokenizer.make_tokenizer(_tokenizer_files(kit.path, kit.manifest), load_config(kit).vocab_size)


def load_weights(kit: Kit, name: str) -> dict[str, Tensor]:
    """Load one of the tensor files of a kit that was read, `EMULATOR` or `OUTER`, to the CPU.

    Raises:
        KitError: The file is not the one that was checked.
    """
    path = kit.path / name
    with naming(f"kit {kit.path}"):
        kit.manifest.files[name].check_hash(name, sha256_of(path))
        with open_tensors(path) as file:
            return {key: file.read(key) for key in file.specs}


def facts(kit: Kit) -> dict[str, Any]:
    """Facts on a kit, in plain types.

    `base_mb` is what the whole base model would take in the kit's dtype; `middle.kept` the share of the parameters of
    the base's middle that the emulator has.
    """
    manifest = kit.manifest
    model = build(load_config(kit), manifest.split, manifest.middle)
    layers = find_layers(model).layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    middle = manifest.split.middle(len(layers))
    middle_size = sum(sizes[number] for number in middle)
    base = len(manifest.split.middle(manifest.depth)) * sizes[manifest.split.outer(len(layers))[0]]
    rest = sum(p.numel() for p in model.parameters()) - middle_size
    outer, dtype = manifest.outer, str(kit.config["dtype"])
    outer_dtype = DTYPES[next(iter(outer.values())).dtype]
    return {
        "kit": kit.path,
        "digest": kit.digest,
        "model_type": manifest.model_type,
        "layers": manifest.depth,
        "calibration": dataclasses.asdict(manifest.calibration),
        "split": {"first": manifest.split.first, "last": manifest.split.last},
        "middle": {"layers": len(middle), "of": len(manifest.split.middle(manifest.depth)), "kept": middle_size / base},
        "dtype": dtype,
        "emulator_mb": manifest.files[EMULATOR].bytes / 1e6,
        "outer_mb": manifest.files[OUTER].bytes / 1e6,
        "base_mb": (rest + base) * getattr(torch, dtype).itemsize / 1e6,
        "outer": {"tensors": len(outer), "dtype": str(outer_dtype).removeprefix("torch.")},
    }
