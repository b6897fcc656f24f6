"""The manifest of a kit, protocol 1: the files of the folder, and the shapes from which the emulator is built.

    {"siftune_kit": 1,
     "base": {"model_type": "llama", "layers": 30, "fingerprint": "<sha256>"},
     "calibration": {"kind": "rows", "number": 32, "tokens": 128, "seed": null},
     "split": {"first": 2, "last": 2},
     "middle": [{"base": 2, "ranks": {"self_attn.q_proj": 201}, "channels": 1075}],
     "adapter": {"first.0.self_attn.q_proj.weight": {"shape": [576, 576], "dtype": "F32"}},
     "files": {"config.json": {"bytes": 123, "sha256": "<sha256>"}}}

Keys are sorted, the indent is 2, and no other key is allowed: a manifest has one form only, so that the hash of its
bytes identifies the kit. The calibration is "rows" or "own texts" of the base, which have a seed and begin with
prompts: the owner's word, which nobody else can check. The manifest of a return (`exchange.returned`) has the same
form, and may state a promise of differential privacy: the data owner's word, which nobody else can check. Its keys are
those of `methods.dp.accounting.statement`, all of them and no others.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import KitError
from siftune.models.families import FAMILIES, Family
from siftune.offsite.emulator.model import LayerShape, Split
from siftune.offsite.kit.strict import (
    Check,
    as_int,
    as_list,
    as_map,
    as_object,
    as_text,
    null_or,
    number,
    one_of,
    parse_json,
    shown,
    whole,
)
from siftune.offsite.kit.tensors import MAX_SIZE, MAX_TENSORS, TensorSpec, parse_spec

PROTOCOL = 1
MANIFEST = "manifest.json"
EMULATOR = "emulator.safetensors"
# protocol 1 calls the outer layers "adapter", here and in the manifest: files keep that name, code says outer
OUTER = "adapter.safetensors"

REQUIRED = ("config.json", "tokenizer.json", "tokenizer_config.json", EMULATOR, OUTER)
OPTIONAL = ("chat_template.jinja",)

# bytes that a file of a kit may have at most
LIMITS = {
    MANIFEST: 4 << 20,
    "config.json": 1 << 20,
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
    EMULATOR: 1 << 40,
    OUTER: 1 << 40,
}
MAX_LAYERS = 512
HASH = r"[0-9a-f]{64}"
NAME = r"[A-Za-z0-9_.]{1,200}"  # of a tensor


@dataclass(frozen=True)
class FileSpec:
    """Size and hash of a file."""

    bytes: int
    sha256: str  # in hexadecimal

    def check_size(self, name: str, size: int) -> None:
        """Refuse a file of another size; `name` is the file's, for the message."""
        if size != self.bytes:
            raise KitError(f"{name} has {size} bytes, but {MANIFEST}: files.{name}.bytes is {self.bytes}")

    def check_hash(self, name: str, sha256: str) -> None:
        """Refuse a file of another hash."""
        if sha256 != self.sha256:
            raise KitError(f"{name} has the SHA-256 {sha256}, but {MANIFEST}: files.{name}.sha256 is {self.sha256}")


OWN_TEXTS, ROWS = "own texts", "rows"  # kinds of calibration


@dataclass(frozen=True)
class Calibration:
    """What a kit was calibrated on, by the owner's word."""

    kind: str  # OWN_TEXTS, which the base wrote itself, or ROWS
    number: int
    tokens: int  # of each, at most
    seed: int | None = None  # of own texts

    def __str__(self) -> str:
        """In a line."""
        if self.kind == ROWS:
            return f"{self.number:,} rows of at most {self.tokens:,} tokens"
        return (
            f"{self.number:,} texts of at most {self.tokens:,} tokens, which the base wrote itself after prompts; "
            f"seed {self.seed}"
        )


@dataclass(frozen=True)
class Manifest:
    """The content of a kit's manifest.json."""

    model_type: str  # family of the base, in transformers' words
    depth: int  # decoder layers of the base
    fingerprint: str  # of the base's weights, from `fingerprint`
    calibration: Calibration
    split: Split  # outer layers at either end
    middle: tuple[LayerShape, ...]  # shapes of the emulator's layers between
    # neutral name -> shape and dtype, of the outer layers' tensors: what a return must hold
    outer: dict[str, TensorSpec]
    files: dict[str, FileSpec]  # name -> size and hash, of every file but the manifest

    @property
    def emulator_depth(self) -> int:
        """Decoder layers of the emulator."""
        return self.split.first + len(self.middle) + self.split.last


def canonical(value: Any) -> bytes:
    """JSON in the one form of manifests."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("ascii")


def dump_manifest(manifest: Manifest) -> bytes:
    """Write down a manifest."""
    return canonical(
        {
            "siftune_kit": PROTOCOL,
            "base": {
                "model_type": manifest.model_type,
                "layers": manifest.depth,
                "fingerprint": manifest.fingerprint,
            },
            "calibration": dataclasses.asdict(manifest.calibration),
            "split": dataclasses.asdict(manifest.split),
            "middle": [{**dataclasses.asdict(shape), "ranks": dict(shape.ranks)} for shape in manifest.middle],
            "adapter": {name: dataclasses.asdict(spec) for name, spec in manifest.outer.items()},
            "files": {name: dataclasses.asdict(spec) for name, spec in manifest.files.items()},
        }
    )


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest and check every field of it.

    Raises:
        KitError: A field is missing, unknown, of another type, or out of range; or its form is not the canonical one.
    """
    whole = parse_protocol(data, "siftune_kit", ("base", "calibration", "split", "middle", "adapter", "files"))
    base = as_object(whole["base"], f"{MANIFEST}: base", ("model_type", "layers", "fingerprint"))
    model_type = base["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise KitError(f"{MANIFEST}: base.model_type is {shown(model_type)}; known are {', '.join(FAMILIES)}")
    depth = as_int(base["layers"], f"{MANIFEST}: base.layers", 2, MAX_LAYERS)
    split = _split(whole["split"], depth)
    return Manifest(
        model_type=model_type,
        depth=depth,
        fingerprint=as_text(base["fingerprint"], f"{MANIFEST}: base.fingerprint", HASH),
        calibration=_calibration(whole["calibration"]),
        split=split,
        middle=_middle(whole["middle"], split.middle(depth), FAMILIES[model_type]),
        outer=_outer(whole["adapter"]),
        files=parse_files(whole["files"], REQUIRED, OPTIONAL),
    )


def parse_protocol(data: bytes, key: str, others: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Parse a manifest as far as its keys: first its protocol, since another one may have other keys."""
    whole = parse_json(data, MANIFEST)
    if not isinstance(whole, dict) or key not in whole:
        raise KitError(f"{MANIFEST} has no {key}")
    if type(whole[key]) is not int or whole[key] != PROTOCOL:  # 1.0 and true are equal to 1
        raise KitError(
            f"{MANIFEST}: {key} is {shown(whole[key])}, a protocol that this siftune does not know; it knows {PROTOCOL}"
        )
    as_object(whole, MANIFEST, (key, *others), optional)
    if data != canonical(whole):
        raise KitError(f"{MANIFEST} is not in the form that siftune writes: keys sorted, indent 2")
    return whole


def parse_files(value: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, FileSpec]:
    """Check the table of files: names from the list only, so that none can lead elsewhere."""
    table = as_object(value, f"{MANIFEST}: files", required, optional)
    specs = {}
    for name, entry in table.items():
        where = f"{MANIFEST}: files.{name}"
        as_object(entry, where, ("bytes", "sha256"))
        size = as_int(entry["bytes"], f"{where}.bytes", 1, LIMITS[name])
        specs[name] = FileSpec(size, as_text(entry["sha256"], f"{where}.sha256", HASH))
    return specs


_CALIBRATION: dict[str, Check] = {
    "kind": one_of(ROWS, OWN_TEXTS),
    "number": whole(1, 2**31),
    "tokens": whole(1, 2**31),
    "seed": null_or(whole(0, 2**32 - 1)),
}


def _calibration(value: Any) -> Calibration:
    where = f"{MANIFEST}: calibration"
    for name, part in as_object(value, where, tuple(_CALIBRATION)).items():
        _CALIBRATION[name](part, f"{where}.{name}")
    calibration = Calibration(**value)
    if (calibration.kind == OWN_TEXTS) != (calibration.seed is not None):
        raise KitError(f"{where} is of {calibration.kind}; {OWN_TEXTS} have a seed, rows have none")
    return calibration


def _split(value: Any, depth: int) -> Split:
    where = f"{MANIFEST}: split"
    as_object(value, where, ("first", "last"))
    first, last = (as_int(value[name], f"{where}.{name}", 0, depth) for name in ("first", "last"))
    if not 1 <= first + last < depth:
        raise KitError(f"{where} has {first} first and {last} last of {depth} layers; some must be, and not all")
    return Split(first, last)


def _middle(value: Any, numbers: range, family: Family) -> tuple[LayerShape, ...]:
    where = f"{MANIFEST}: middle"
    if not as_list(value, where, len(numbers)):
        raise KitError(f"{where} has no layer")
    shapes = tuple(_layer(entry, f"{where}.{place}", numbers, family) for place, entry in enumerate(value))
    for place, (before, shape) in enumerate(pairwise(shapes), 1):
        if shape.base <= before.base:
            raise KitError(
                f"{where}.{place}.base is {shape.base}, but a layer before it is the base's layer {before.base}"
            )
    return shapes


def _layer(value: Any, where: str, numbers: range, family: Family) -> LayerShape:
    as_object(value, where, ("base", "ranks", "channels"))
    channels = value["channels"]
    ranks = as_object(value["ranks"], f"{where}.ranks", (), family.matrices if channels is None else family.attention)
    if channels is not None:
        as_int(channels, f"{where}.channels", 1, MAX_SIZE)
    return LayerShape(
        base=as_int(value["base"], f"{where}.base", numbers.start, numbers.stop - 1),
        ranks={path: as_int(rank, f"{where}.ranks.{path}", 1, MAX_SIZE) for path, rank in ranks.items()},
        channels=channels,
    )


def _outer(value: Any) -> dict[str, TensorSpec]:
    where = f"{MANIFEST}: adapter"
    specs = {}
    for name, entry in as_map(value, where, MAX_TENSORS).items():
        as_text(name, f"{where}, the name of a tensor", rf"(first|last)\.{NAME}")
        specs[name] = parse_spec(entry, f"{where}.{name}")
    if len({spec.dtype for spec in specs.values()}) > 1:
        raise KitError(f"{where} has tensors of several dtypes; it must be one")
    return specs


_CHUNK = 1 << 22  # values that are hashed at a time


def fingerprint(model: nn.Module) -> str:
    """SHA-256 in hexadecimal that names a base model's weights, held in float32 or in the checkpoint's bfloat16 alike.

    Hashed are, in the order of the names, every tensor's name, shape, and values in float32; a tensor that is tied to
    another counts once. One piece of a tensor is converted at a time. The model is without PEFT or other wrappers.

    Raises:
        KitError: A weight has no values in memory, as where it is on the meta device.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    digest, state = hashlib.sha256(), model.state_dict()
    for name in sorted(state.keys() - set(tied)):
        _add(digest, name, state[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise KitError(f"{name} of the model has no values: load the model with all its weights in memory")
    digest.update(json.dumps([name, list(tensor.shape)]).encode())
    for piece in torch.split(tensor.reshape(-1), _CHUNK):
        digest.update(piece.to("cpu", torch.float32).numpy().astype("<f4", copy=False).data)


PRIVACY = "privacy"  # a key of a return's manifest
_PROMISE = f"{MANIFEST}: {PRIVACY}"


def _version(value: Any, where: str) -> None:
    as_text(value, where, r"[0-9A-Za-z.+-]{1,32}")


_PROMISED: dict[str, Check] = {
    "epsilon": number(0, 1000),
    "delta": number(1e-300, 1 - 1e-9),
    "noise_multiplier": number(1e-6, 1e7),
    "clip": number(1e-12, 1e12),
    "sampling_rate": number(1e-12, 1),
    "expected_batch": whole(1, 2**31),
    "steps": whole(0, 2**31),
    "accountant": one_of("opacus PRV"),
    "accountant_version": _version,
    "unit": one_of("one training row, there or not"),
}


def check_promise(value: Any) -> dict[str, Any]:
    """Hold a statement on privacy to its keys, types and ranges.

    Raises:
        KitError: With file and field.
    """
    for name, part in as_object(value, _PROMISE, tuple(_PROMISED)).items():
        _PROMISED[name](part, f"{_PROMISE}.{name}")
    promise: dict[str, Any] = value
    return promise


def in_words(promise: dict[str, Any]) -> str:
    """A statement in a line."""
    return (
        f"ε = {promise['epsilon']:.4g}, δ = {promise['delta']:g} for {promise['unit']}, after {promise['steps']} "
        "steps: the data owner's word"
    )
