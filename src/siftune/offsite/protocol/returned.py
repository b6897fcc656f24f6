"""Returns on disk: what the data owner hands back, the tuned outer layers and nothing else.

RETURN/
  manifest.json            {"siftune_return": 1, "kit": "<sha256 of the kit's manifest.json>", "files": {…}}, and
                           "privacy" where it was tuned with differential privacy: see `kit.promise`
  adapter.safetensors      exactly the names, shapes and dtypes of the kit's manifest
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from siftune.errors import KitError
from siftune.offsite.kit.folder import Kit
from siftune.offsite.kit.manifest import (
    HASH,
    LIMITS,
    MANIFEST,
    OUTER,
    PROTOCOL,
    canonical,
    parse_files,
    parse_protocol,
)
from siftune.offsite.kit.promise import KEY as PRIVACY
from siftune.offsite.kit.promise import check_promise
from siftune.offsite.kit.strict import as_text, fresh_folder, list_files, naming, read_bytes, sha256_of
from siftune.offsite.kit.tensor_file import open_tensors
from siftune.offsite.kit.tensors import MAX_HEADER, check_finite, check_specs, spec_of, write_tensors

_KIT_MANIFEST = f"{MANIFEST} of the kit"


def write_return(
    out: str | Path, tensors: Mapping[str, Tensor], kit: Kit, privacy: Mapping[str, Any] | None = None
) -> Path:
    """Write a return, beside its place and then in one move.

    Args:
        out: Its folder; missing or empty.
        tensors: Neutral name -> tuned tensor, on any device; names, shapes and dtypes as the kit's manifest has them.
        kit: The kit that was tuned.
        privacy: What a private run says of itself; see `kit.promise`.

    Returns:
        The folder.

    Raises:
        ModelError: `out` is in use.
        KitError: A tensor is missing, superfluous, of another shape or dtype, or holds NaN or infinity; or `out`
            cannot be written to. Nothing is left behind.
    """
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    check_specs(specs, kit.manifest.outer, "what was tuned", _KIT_MANIFEST)
    with fresh_folder(out) as folder:
        path = folder / OUTER
        write_tensors(path, tensors)
        entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        whole: dict[str, Any] = {"siftune_return": PROTOCOL, "kit": kit.digest, "files": {OUTER: entry}}
        if privacy:
            whole[PRIVACY] = check_promise(dict(privacy))
        (folder / MANIFEST).write_bytes(canonical(whole))
    return Path(out)


def read_return(path: str | Path, kit: Kit) -> dict[str, Tensor]:
    """Check a return and load it.

    Sizes, manifest and header are checked before memory is taken. Every file is opened once: what is checked is what is
    loaded.

    Args:
        path: Its folder, which may be reached by a link.
        kit: The kit that it must be made for.

    Returns:
        Neutral name -> tensor on the CPU: exactly those of the kit's manifest, all values finite.

    Raises:
        KitError: Anything is out of order. The message names file and field.
    """
    folder = Path(path)
    with naming(f"return {folder}"):
        if (folder / "return").is_dir():
            raise KitError(f"it is a whole run; the return is in it: give {folder / 'return'}")
        limit = MAX_HEADER + 8 + sum(spec.bytes for spec in kit.manifest.outer.values())
        sizes = list_files(folder, {MANIFEST: LIMITS[MANIFEST], OUTER: limit})
        for name in (MANIFEST, OUTER):
            if name not in sizes:
                raise KitError(f"it has no {name}")
        whole = _read_manifest(folder)
        _check_kit(as_text(whole["kit"], f"{MANIFEST}: kit", HASH), kit)
        spec = parse_files(whole["files"], (OUTER,))[OUTER]
        spec.check_size(OUTER, sizes[OUTER])
        with open_tensors(folder / OUTER) as file:
            check_specs(file.specs, kit.manifest.outer, OUTER, _KIT_MANIFEST)
            tensors = file.load(spec)
        for name, tensor in tensors.items():
            check_finite(tensor, f"{OUTER}: {name}")
        return tensors


def promise_of(path: str | Path) -> dict[str, Any] | None:
    """What a return says of its differential privacy; None where it says nothing.

    Raises:
        KitError: Its manifest is out of order.
    """
    with naming(f"return {path}"):
        return _read_manifest(Path(path)).get(PRIVACY)


def _read_manifest(folder: Path) -> dict[str, Any]:
    text = read_bytes(folder / MANIFEST, LIMITS[MANIFEST])
    whole = parse_protocol(text, "siftune_return", ("kit", "files"), (PRIVACY,))
    if PRIVACY in whole:
        check_promise(whole[PRIVACY])
    return whole


def _check_kit(digest: str, kit: Kit) -> None:
    if digest != kit.digest:
        raise KitError(
            f"{MANIFEST}: kit is {digest}, but the {MANIFEST} of {kit.path} has the SHA-256 {kit.digest}: "
            "it was made for another kit"
        )
