"""Returns on disk: what the data owner hands back, the tuned outer layers and nothing else.

RETURN/
  manifest.json            {"siftune_return": 1, "kit": "<sha256 of the kit's manifest.json>", "files": {…}},
                           "privacy" where it was tuned with differential privacy: see `kit.promise`, and
                           "lora" where LoRA tuned it: {"first.0.self_attn.q_proj.weight": rank, …}
  adapter.safetensors      exactly the names, shapes and dtypes of the kit's manifest; or with "lora" exactly the
                           factors of what was added to these matrices: see `thin`
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from siftune.base.errors import KitError
from siftune.offsite.exchange.thin import KEY as LORA
from siftune.offsite.exchange.thin import Tuned, check_ranks, is_thin, ranks_of, specs_of
from siftune.offsite.kit.folder import Kit, load_weights
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
from siftune.offsite.kit.tensor_file import TensorFile, open_tensors
from siftune.offsite.kit.tensors import DTYPES, MAX_HEADER, TensorSpec, check_specs, spec_of, write_tensors

_KIT_MANIFEST = f"{MANIFEST} of the kit"


def write_return(
    out: str | Path, tensors: Mapping[str, Tensor], kit: Kit, privacy: Mapping[str, Any] | None = None
) -> Path:
    """Write a return, beside its place and then in one move; return its folder.

    Args:
        out: Its folder; missing or empty.
        tensors: Neutral name -> tuned tensor, on any device; names, shapes and dtypes as the kit's manifest has them.
            Or the factors of what was added to its matrices; see `thin`.
        kit: The kit that was tuned.
        privacy: What a private run says of itself; see `kit.promise`.

    Raises:
        ModelError: `out` is in use.
        KitError: A tensor is missing, superfluous, of another shape or dtype, or holds NaN or infinity; or `out`
            cannot be written to. Nothing is left behind.
    """
    specs, ranks = {name: spec_of(tensor) for name, tensor in tensors.items()}, ranks_of(tensors)
    expected, by = _expected(check_ranks(ranks, kit) if ranks else {}, kit)
    check_specs(specs, expected, "what was tuned", by)
    with fresh_folder(out) as folder:
        path = folder / OUTER
        write_tensors(path, tensors)
        entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        whole: dict[str, Any] = {"siftune_return": PROTOCOL, "kit": kit.digest, "files": {OUTER: entry}}
        if ranks:
            whole[LORA] = ranks
        if privacy:
            whole[PRIVACY] = check_promise(dict(privacy))
        (folder / MANIFEST).write_bytes(canonical(whole))
    return Path(out)


class OpenReturn(Mapping[str, Tensor]):
    """A return that has passed every check. Its tensors are read when they are asked for, and held to what was checked.

    Attributes:
        path: Its folder.
        sha256: Hash of its tensors' file: two returns that share it are the same.
        privacy: What it says of its differential privacy; None where it says nothing.
    """

    def __init__(self, path: Path, file: TensorFile, sha256: str, privacy: dict[str, Any] | None) -> None:
        self.path, self.sha256, self.privacy = path, sha256, privacy
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor, on the CPU.

        Raises:
            KitError: The file has changed since it was checked.
        """
        with naming(f"return {self.path}"):
            return self._file.again(name)

    def __iter__(self) -> Iterator[str]:
        """The names of its tensors, in either form of `thin`."""
        return iter(self._file.specs)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self._file.specs)


@contextmanager
def open_return(path: str | Path, kit: Kit) -> Iterator[OpenReturn]:
    """Check a return for a kit, completely, and keep it open; no tensor of it is in memory until it is asked for.

    Sizes, manifest and header are checked before memory is taken. Every file is opened once: what is checked is what is
    loaded. The folder may be reached by a link.

    Raises:
        KitError: Anything is out of order. The message names file and field.
    """
    folder = Path(path)
    with ExitStack() as stack, naming(f"return {folder}"):
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
        expected, by = _expected(check_ranks(whole[LORA], kit) if LORA in whole else {}, kit)
        file = stack.enter_context(open_tensors(folder / OUTER))
        check_specs(file.specs, expected, OUTER, by)
        file.check(spec)
        closing = stack.pop_all()
    try:
        yield OpenReturn(folder, file, spec.sha256, whole.get(PRIVACY))
    finally:
        closing.close()  # without the fault of the block, which is not one of this file


def read_return(path: str | Path, kit: Kit) -> dict[str, Tensor]:
    """Check a return for a kit and load it, with the kit's own outer layers where it holds what was added to them.

    Returns:
        Neutral name -> tensor on the CPU: exactly those of the kit's manifest, all values finite.

    Raises:
        KitError: Anything is out of order. The message names file and field.
    """
    with open_return(path, kit) as found:
        tuned = Tuned(load_weights(kit, OUTER) if is_thin(found) else {}, found)
        with naming(f"return {path}"):
            return {name: tuned[name].to(DTYPES[spec.dtype]) for name, spec in kit.manifest.outer.items()}


def _expected(ranks: Mapping[str, int], kit: Kit) -> tuple[Mapping[str, TensorSpec], str]:
    """The tensors that a return must hold, and what says so."""
    return (specs_of(ranks, kit), f"{MANIFEST}: {LORA}") if ranks else (kit.manifest.outer, _KIT_MANIFEST)


def _read_manifest(folder: Path) -> dict[str, Any]:
    text = read_bytes(folder / MANIFEST, LIMITS[MANIFEST])
    whole = parse_protocol(text, "siftune_return", ("kit", "files"), (PRIVACY, LORA))
    if PRIVACY in whole:
        check_promise(whole[PRIVACY])
    return whole


def _check_kit(digest: str, kit: Kit) -> None:
    if digest != kit.digest:
        raise KitError(
            f"{MANIFEST}: kit is {digest}, but the {MANIFEST} of {kit.path} has the SHA-256 {kit.digest}: "
            "it was made for another kit"
        )
