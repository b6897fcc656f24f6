"""The two forms of what a return holds, and what the outer layers are after it.

    whole   NAME                    every tensor of the outer layers, as tuned
    thin    NAME.up, NAME.down      W' = W + up · down for the matrices that LoRA adapted; all else is as it was

Shapes: W (P, Q) as the state dict has it, up (P, R), down (R, Q), both in float32 whatever the kit's dtype.

Ours: the factors are not LoRA's own B and A. Those tell more than the model that comes of them: A begins as numbers
that a seed tells, so that what A moved by is a sum of gradients. So, as in kits, the factors are `drd.canonical`: the
SVD of the product with LoRA's scale in it, which tells nothing but the product. A return is thin only where every pair
takes fewer bytes than its matrix, which bounds R.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from siftune.base.errors import KitError
from siftune.offsite.kit.folder import Kit
from siftune.offsite.kit.manifest import MANIFEST, OUTER
from siftune.offsite.kit.strict import as_int, as_map, shown
from siftune.offsite.kit.tensors import MAX_TENSORS, TensorSpec, check_finite

UP, DOWN = ".up", ".down"
KEY = "lora"  # of a return's manifest: name of a matrix -> rank
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
    where = f"{MANIFEST}: {KEY}"
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
    """What a return with these ranks holds."""
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
        up, down = (self._returned[f"{name}{end}"].detach().to(old.device).double() for end in (UP, DOWN))
        if old.ndim != 2 or (up.shape, down.shape) != ((len(old), len(down)), (len(down), old.shape[1])):
            raise KitError(
                f"the factors of {name} in the return have the shapes {tuple(up.shape)} and {tuple(down.shape)}, "
                f"which do not fit {tuple(old.shape)}: give a return of this kit"
            )
        after = old.double() + up @ down
        check_finite(after, f"{OUTER}: {name}, with its factors")
        return after

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._before if self._ranks else self._returned)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self._before if self._ranks else self._returned)
