"""Returns on disk: the tuned outer layers that the data owner hands back, and nothing else.

    RETURN/
      manifest.json          {"siftune_return": 1, "kit": "<sha256 of the kit's manifest.json>", "files": {…}},
                             "privacy" if it was tuned with differential privacy: see `kit.manifest`, and
                             "lora" if LoRA tuned it: {"first.0.self_attn.q_proj.weight": rank, …}
      adapter.safetensors    exactly the names, shapes and dtypes of the kit's manifest; or with "lora" exactly the
                             factors of the updates of these matrices

A return holds one of two forms:

    whole   NAME                    every tensor of the outer layers, as tuned
    thin    NAME.up, NAME.down      W' = W + up · down for the matrices that LoRA adapted; the others are unchanged

Shapes: W (P, Q) as in the state dict, up (P, R), down (R, Q), both in float32 whatever the kit's dtype.

Ours: the factors are not LoRA's own B and A, which reveal more than the resulting model: A starts as numbers that a
seed determines, so that its change is a sum of gradients. As in kits, the factors are `drd.canonical`: the SVD of the
product with LoRA's scale in it, which reveals the product alone. A return is thin only if every pair takes fewer bytes
than its matrix, which bounds R.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from siftune.base.errors import KitError
from siftune.base.numerics import in_float64
from siftune.offsite.kit.folder import Kit, load_weights
from siftune.offsite.kit.manifest import (
    HASH,
    LIMITS,
    MANIFEST,
    OUTER,
    PRIVACY,
    PROTOCOL,
    canonical,
    check_promise,
    parse_files,
    parse_protocol,
)
from siftune.offsite.kit.strict import (
    as_int,
    as_map,
    as_text,
    fresh_folder,
    list_files,
    naming,
    read_bytes,
    sha256_of,
    shown,
)
from siftune.offsite.kit.tensors import (
    DTYPES,
    MAX_TENSORS,
    TensorFile,
    TensorSpec,
    check_finite,
    check_specs,
    open_tensors,
    spec_of,
    write_tensors,
)

UP, DOWN = ".up", ".down"
LORA = "lora"  # of a return's manifest: name of a matrix -> rank
_DTYPE, _BYTES = "F32", 4


def ranks_of(returned: Mapping[str, Tensor]) -> dict[str, int]:
    """Name of a matrix -> rank of its factors; empty for whole tensors.

    Raises:
        KitError: Factors do not come in pairs that fit, or stand beside something else.
    """
    if not is_thin(returned):
        return {}
    names = {name.removesuffix(UP).removesuffix(DOWN) for name in returned}
    for name in sorted(names):
        if not {f"{name}{UP}", f"{name}{DOWN}"} <= returned.keys() or name in returned:
            raise KitError(f"{shown(name)} of the return is not a pair of factors, but others are: give both of them")
    return {name: returned[f"{name}{DOWN}"].shape[0] for name in names}


def is_thin(returned: Mapping[str, Tensor]) -> bool:
    """Whether a return holds factors."""
    return any(name.endswith((UP, DOWN)) for name in returned)


def largest_rank(spec: TensorSpec) -> int:
    """The largest rank at which two factors take fewer bytes than a tensor; 0 for what is no matrix, or too small."""
    return (spec.bytes - 1) // (_BYTES * sum(spec.shape)) if len(spec.shape) == 2 else 0


def check_ranks(value: Any, kit: Kit) -> dict[str, int]:
    """Hold a table of ranks to the kit: matrices of its outer layers, factors that are smaller than these.

    Raises:
        KitError: With file and field.
    """
    where = f"{MANIFEST}: {LORA}"
    table: dict[str, int] = as_map(value, where, MAX_TENSORS)
    for name, rank in table.items():
        if name not in kit.manifest.outer:
            raise KitError(f"{where} has the unknown key {shown(name)}")
        most = largest_rank(kit.manifest.outer[name])
        if most < 1:
            raise KitError(f"{where} has {name}, of which no factors are smaller than itself: give it whole")
        as_int(rank, f"{where}.{name}", 1, most)
    return table


def specs_of(ranks: Mapping[str, int], kit: Kit) -> dict[str, TensorSpec]:
    """The tensors of a return with these ranks."""
    specs = {}
    for name, rank in ranks.items():
        rows, columns = kit.manifest.outer[name].shape
        specs[f"{name}{UP}"] = TensorSpec((rows, rank), _DTYPE)
        specs[f"{name}{DOWN}"] = TensorSpec((rank, columns), _DTYPE)
    return specs


class Tuned(Mapping[str, Tensor]):
    """The outer layers after a return, in either form, each tensor made when it is asked for; `before` is not copied.

    What was added by factors is in float64, so that the update is their product and nothing else; other tensors are as
    they came.

    Raises:
        KitError: Factors do not come in pairs, or are not of the outer layers' matrices.
    """

    def __init__(self, before: Mapping[str, Tensor], returned: Mapping[str, Tensor]) -> None:
        self._before, self._returned = before, returned
        self._ranks = ranks_of(returned)
        for name in self._ranks:
            if name not in before:
                raise KitError(f"tensor {shown(name)} is none of the outer layers', but in the return")

    def __getitem__(self, name: str) -> Tensor:
        """A tensor as tuned.

        Raises:
            KitError: Factors do not fit the tensor, or lead to a number that is not finite or far too large.
        """
        if not self._ranks:
            return self._returned[name]
        old = self._before[name].detach()
        if name not in self._ranks:
            return old
        up, down = (in_float64(self._returned[f"{name}{end}"].detach().to(old.device)) for end in (UP, DOWN))
        if old.ndim != 2 or (up.shape, down.shape) != ((len(old), len(down)), (len(down), old.shape[1])):
            raise KitError(
                f"the factors of {name} in the return have the shapes {tuple(up.shape)} and {tuple(down.shape)}, "
                f"which do not fit {tuple(old.shape)}: give a return of this kit"
            )
        after = in_float64(old) + up @ down
        check_finite(after, f"{OUTER}: {name}, with its factors")
        return after

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._before if self._ranks else self._returned)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._before if self._ranks else self._returned)


def write_return(
    out: str | Path, tensors: Mapping[str, Tensor], kit: Kit, privacy: Mapping[str, Any] | None = None
) -> Path:
    """Write a return, beside its place and then in one move; return its folder.

    Args:
        out: Its folder; missing or empty.
        tensors: Neutral name -> tuned tensor, on any device; names, shapes and dtypes as the kit's manifest has them.
            Or the factors of what was added to its matrices.
        kit: The kit that was tuned.
        privacy: What a private run says of itself; see `kit.manifest`.

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
    """A return that has passed every check. Its tensors are read when they are asked for.

    Attributes:
        privacy: What it says of its differential privacy; None where it says nothing.
    """

    def __init__(self, file: TensorFile, privacy: dict[str, Any] | None) -> None:
        self.privacy = privacy
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor, on the CPU."""
        return self._file.read(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._file.specs

    def __iter__(self) -> Iterator[str]:
        """The names of its tensors, in either form."""
        return iter(self._file.specs)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._file.specs)


@contextmanager
def open_return(path: str | Path, kit: Kit) -> Iterator[OpenReturn]:
    """Check a return for a kit, completely, and keep it open; no tensor of it is in memory until it is asked for.

    Sizes, manifest and header are checked before memory is taken. The folder may be reached by a link.

    Raises:
        KitError: Anything is out of order. The message names file and field.
    """
    folder = Path(path)
    with ExitStack() as stack, naming(f"return {folder}"):
        if (folder / "return").is_dir():
            raise KitError(f"it is a whole run; the return is in it: give {folder / 'return'}")
        sizes = list_files(folder, {name: LIMITS[name] for name in (MANIFEST, OUTER)})
        for name in (MANIFEST, OUTER):
            if name not in sizes:
                raise KitError(f"it has no {name}")
        text = read_bytes(folder / MANIFEST, LIMITS[MANIFEST])
        whole = parse_protocol(text, "siftune_return", ("kit", "files"), (PRIVACY, LORA))
        if PRIVACY in whole:
            check_promise(whole[PRIVACY])
        if (digest := as_text(whole["kit"], f"{MANIFEST}: kit", HASH)) != kit.digest:
            raise KitError(
                f"{MANIFEST}: kit is {digest}, but the {MANIFEST} of {kit.path} has the SHA-256 {kit.digest}: "
                "it was made for another kit"
            )
        spec = parse_files(whole["files"], (OUTER,))[OUTER]
        spec.check_size(OUTER, sizes[OUTER])
        expected, by = _expected(check_ranks(whole[LORA], kit) if LORA in whole else {}, kit)
        file = stack.enter_context(open_tensors(folder / OUTER))
        check_specs(file.specs, expected, OUTER, by)
        spec.check_hash(OUTER, sha256_of(folder / OUTER))
        file.check_numbers()
        closing = stack.pop_all()
    try:
        yield OpenReturn(file, whole.get(PRIVACY))
    finally:
        closing.close()  # without the fault of the block, which is not one of this file


def read_return(path: str | Path, kit: Kit) -> dict[str, Tensor]:
    """Check a return for a kit and load it, with the kit's own outer layers where it holds what was added to them.

    Returns:
        Neutral name -> tensor on the CPU: exactly those of the kit's manifest, all values finite.

    Raises:
        KitError: Anything is out of order. The message names file and field.
    """
    with open_return(path, kit) as returned:
        tuned = Tuned(load_weights(kit, OUTER) if is_thin(returned) else {}, returned)
        with naming(f"return {path}"):
            return {name: tuned[name].to(DTYPES[spec.dtype]) for name, spec in kit.manifest.outer.items()}


def _expected(ranks: Mapping[str, int], kit: Kit) -> tuple[Mapping[str, TensorSpec], str]:
    """The tensors that a return must hold, and what says so."""
    return (specs_of(ranks, kit), f"{MANIFEST}: {LORA}") if ranks else (kit.manifest.outer, f"{MANIFEST} of the kit")
