"""`siftune verify`: check a kit or a return, and say what it holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tyro.conf import Positional

from siftune.errors import KitError

if TYPE_CHECKING:
    from siftune.offsite.kit.folder import Kit


@dataclass
class Options:
    """Check a kit, or with --kit a return for it: files, hashes, shapes and numbers. Nothing in them is run.

    A kit is what `siftune emulate` writes, a return what `siftune train --model KIT` leaves behind.
    """

    path: Positional[Path]
    """Folder of the kit or of the return."""
    kit: Path | None = None
    """Kit that a return is for."""
    public_key: Path | None = None
    """Public key of the owner, a PEM file; the kit must then be signed by the owner."""


def run(options: Options) -> dict[str, Any]:
    """Check, and print what it is."""
    from siftune.offsite.kit.folder import is_kit, read_kit

    console = Console(highlight=False, soft_wrap=True)
    if is_kit(options.path):
        if options.kit is not None:
            raise KitError(f"{options.path} is a kit itself: leave out --kit, which names the kit of a return")
        return _show_kit(read_kit(options.path, options.public_key), console)
    if options.kit is None:
        if not options.path.is_dir():
            raise KitError(f"there is no folder {options.path}: give the folder of a kit or of a return")
        raise KitError(f"{options.path} is no kit; if it is a return, name its kit with --kit")
    return _show_return(options.path, read_kit(options.kit, options.public_key), console)


def facts(kit: "Kit") -> dict[str, Any]:
    """What a kit is, from its shapes and sizes alone.

    Returns:
        Plain types. `base_mb` is what the whole base model would take in the kit's dtype; `middle.kept` the share of
        the parameters of the base's middle that the emulator has.
    """
    from siftune.models.layers import find_layers
    from siftune.offsite.emulator.model import build
    from siftune.offsite.kit.folder import load_config
    from siftune.offsite.kit.tensors import tensor_specs

    manifest = kit.manifest
    model = build(load_config(kit), manifest.split, manifest.middle)
    layers = find_layers(model).layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    middle = manifest.split.middle(len(layers))
    own = sum(sizes[number] for number, shape in zip(middle, manifest.middle, strict=True) if shape.same_as is None)
    base = len(manifest.split.middle(manifest.depth)) * sizes[manifest.split.outer(len(layers))[0]]
    rest = sum(p.numel() for p in model.parameters()) - sum(sizes[number] for number in middle)
    specs = tensor_specs(kit.path / "emulator.safetensors")
    spec = next(iter(specs.values()))
    adapter = manifest.adapter
    return {
        "kit": kit.path,
        "digest": kit.digest,
        "model_type": manifest.model_type,
        "layers": manifest.depth,
        "split": {"first": manifest.split.first, "last": manifest.split.last},
        "middle": {"layers": len(middle), "of": len(manifest.split.middle(manifest.depth)), "kept": own / base},
        "dtype": _words(spec.dtype),
        "emulator_mb": manifest.files["emulator.safetensors"].bytes / 1e6,
        "adapter_mb": manifest.files["adapter.safetensors"].bytes / 1e6,
        "base_mb": (rest + base) * spec.bytes / _numbers(spec.shape) / 1e6,
        "adapter": {"tensors": len(adapter), "dtype": _words(next(iter(adapter.values())).dtype)},
        "signature": "valid" if kit.verified else "not checked" if kit.signed else "none",
    }


def _show_kit(kit: "Kit", console: Console) -> dict[str, Any]:
    found = facts(kit)
    split, middle, adapter = found["split"], found["middle"], found["adapter"]
    signature = {
        "valid": "valid, by the key that was given",
        "not checked": "there is one; give --public-key to check it",
        "none": "none; the kit is as good as the way it came",
    }
    rows = {
        "kit": f"{kit.path} is sound",
        "digest": kit.digest,
        "base": f"{found['model_type']}, {found['layers']} layers",
        "to tune": f"first {split['first']} and last {split['last']} layers: {adapter['tensors']} tensors in "
        f"{adapter['dtype']}, {found['adapter_mb']:,.1f} MB",
        "between": f"{middle['layers']} layers for {middle['of']}, {100 * middle['kept']:.1f} % of their parameters",
        "frozen": f"{found['emulator_mb']:,.1f} MB in {found['dtype']}; all of the base would be "
        f"{found['base_mb']:,.1f} MB",
        "signature": signature[found["signature"]],
    }
    _show(rows, console)
    return found


def _show_return(path: Path, kit: "Kit", console: Console) -> dict[str, Any]:
    from safetensors.torch import load_file

    from siftune.cli.plug import show_updates
    from siftune.offsite.protocol.plug import compare
    from siftune.offsite.protocol.returned import read_return

    returned = read_return(path, kit)
    before = load_file(kit.path / "adapter.safetensors")
    report = compare(before, returned)
    _show({"return": f"{path} is sound", "kit": f"{kit.path}, {kit.digest}", "tensors": str(len(returned))}, console)
    show_updates(report)
    return {"return": path, "kit": kit.path, "digest": kit.digest, "tensors": len(returned), **report.to_dict()}


def _show(rows: dict[str, str], console: Console) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"{name:<{width}}  {value}", markup=False)


def _words(dtype: str) -> str:
    """A dtype of safetensors in torch's words."""
    from siftune.offsite.kit.tensors import DTYPES

    return str(DTYPES[dtype]).removeprefix("torch.")


def _numbers(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
