"""A further round: the next kit of a model that was plugged, in the directions and channels of the kit before.

`plug` changes the outer layers alone. So the next kit has the tuned outer layers and, bit for bit, the earlier kit's
middle, embeddings and head: no calibration rows are read, and nothing of the middle is shown that was not shown before.

Where the owner changed more than that, what the earlier kit shows of a tensor is brought up to date, and no more:

    factored matrix      moves within the kit's directions; `maths.subspace` says by what
    channels of an MLP   the rows and columns of those that the kit has, which are found in the base; columns that were
                         fitted move by as much as the base's do
    everything else      the tuned tensor, as the earlier kit had the base's

What leaks, then: values change, the subspace does not. Whoever has both kits learns the change of the outer layers in
full, of whole tensors in full, of a factored matrix an R × R matrix, of the other channels and directions nothing. The
change of the outer layers is the merged update of the data owners: of two, each can take off its own and has the
other's. `maths.merging` does not hide that; differential privacy bounds what it tells of a row.

The base must be given beside the tuned model, since a kit does not say what it left out. The earlier kit is named by
its owner, too: a plugged model is an ordinary one, and has no trace of a kit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from siftune.base.errors import KitError
from siftune.models.families import Family, family_of
from siftune.models.layers import find_layers
from siftune.models.streamed import tensor_of
from siftune.offsite.emulator.assemble import Tensors, converted
from siftune.offsite.emulator.split import outer_names
from siftune.offsite.exchange.plug import check_base
from siftune.offsite.kit.fingerprint import fingerprint
from siftune.offsite.kit.folder import Kit, KitContents, load_config, load_tokenizer, write_kit
from siftune.offsite.kit.manifest import EMULATOR
from siftune.offsite.kit.strict import naming
from siftune.offsite.kit.tensor_file import TensorFile, open_tensors
from siftune.offsite.kit.tensors import DTYPES
from siftune.offsite.maths.subspace import moved_within


@dataclass(frozen=True)
class NextKit:
    """A kit of a further round."""

    kit: Kit  # read back and checked
    moved: tuple[str, ...]  # names of the tensors besides the outer layers that are not as in the earlier kit


def next_kit(
    base: PreTrainedModel, tuned: PreTrainedModel, kit: Kit, out: str | Path, signing_key: Path | None = None
) -> NextKit:
    """Write the next kit of a tuned model, which shows no direction and no channel that the earlier one did not.

    One tensor is in memory at a time, besides what of the models is.

    Args:
        base: The model that the earlier kit was made from.
        tuned: The model after `plug`; returns of the next kit are plugged into it.
        kit: The earlier kit, from `read_kit`.
        out: Folder of the next kit; must be new or empty.
        signing_key: Private key in PEM format to sign it with; None leaves it unsigned.

    Raises:
        KitError: The base is not the kit's, the tuned model is not of the base's shape, or is the base itself.
        ModelError: The folder is in use.

    Example:
        >>> [name for name in next_kit(base, tuned, kit, folder / "second").moved]
        []
    """
    check_base(base, kit)
    identity = _check_tuned(base, tuned, kit)
    manifest = kit.manifest
    with open_tensors(kit.path / EMULATOR) as file:
        with naming(f"kit {kit.path}"):
            file.check(manifest.files[EMULATOR])
        second = _Second(base, tuned, kit, file)
        contents = KitContents(
            load_config(kit), manifest.split, manifest.middle,
            Tensors({name: partial(second.tensor, name) for name in file.specs}), _outer(tuned, kit),
            load_tokenizer(kit), manifest.depth, identity,
        )  # fmt: skip
        made = write_kit(out, contents, signing_key)
    return NextKit(made, tuple(sorted(second.moved)))


def _check_tuned(base: PreTrainedModel, tuned: PreTrainedModel, kit: Kit) -> str:
    """The tuned model's fingerprint; a model of another shape is refused, and the base itself."""
    shapes, others = ({name: t.shape for name, t in model.state_dict().items()} for model in (base, tuned))
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            raise KitError(
                f"{name} is not of one shape in the base and in the tuned model: give a model that `siftune plug` made "
                "of this base"
            )
    identity = fingerprint(tuned)
    if identity == kit.manifest.fingerprint:
        raise KitError("the tuned model is the base itself: plug a return in first, or hand out the kit that there is")
    return identity


def _outer(tuned: PreTrainedModel, kit: Kit) -> Mapping[str, Tensor]:
    """The tuned outer layers, in the kit's dtype."""
    [dtype] = {DTYPES[spec.dtype] for spec in kit.manifest.outer.values()}
    names = outer_names(tuned, kit.manifest.split)
    return converted(Tensors({neutral: partial(tensor_of, tuned, name) for neutral, name in names.items()}), dtype)


@dataclass(frozen=True)
class _Origin:
    """Where a frozen tensor of a kit is from."""

    base: str | None  # name of the base's tensor; None for a bias that compression added
    # all of it; rows or columns of an MLP's channels; or a factor that writes (up) or reads (down)
    part: Literal["all", "rows", "columns", "up", "down"] = "all"
    # what the names of the tensors of its layer begin with, in the emulator and in the base
    start: tuple[str, str] = ("", "")


def _origin(name: str, path: str, kit: Kit, family: Family) -> _Origin:
    """Where a tensor is from, by its name in the emulator's state dict."""
    number, _, local = name.removeprefix(f"{path}.").partition(".")
    place = int(number) - kit.manifest.split.first if name.startswith(f"{path}.") else -1
    if not 0 <= place < len(kit.manifest.middle):
        return _Origin(name)
    shape = kit.manifest.middle[place]
    start = f"{path}.{number}.", f"{path}.{shape.base}."
    module, _, kind = local.rpartition(".")
    matrix, _, end = module.rpartition(".")
    if matrix in shape.ranks:
        local, part = f"{matrix}.{kind}", "down" if end == "down" else "up" if kind == "weight" else "all"
    elif shape.channels is not None and module in family.reads:
        matrix, part = module, "rows"
    elif shape.channels is not None and module == family.writes:
        matrix, part = module, "columns" if kind == "weight" else "all"
    else:
        part = "all"
    if kind == "bias" and matrix in shape.biased:
        return _Origin(None)
    return _Origin(f"{start[1]}{local}", part, start)  # type: ignore[arg-type]


class _Second:
    """The frozen tensors of the next kit, each made when it is asked for.

    `moved` has the names of those that are not as they were.
    """

    def __init__(self, base: PreTrainedModel, tuned: PreTrainedModel, kit: Kit, file: TensorFile) -> None:
        self._base, self._tuned, self._file = base, tuned, file
        self._family, self.moved = family_of(base.config), set[str]()
        path = find_layers(base).path
        self._origins = {name: _origin(name, path, kit, self._family) for name in file.specs}
        self._channels: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the emulator's state dict.

        Raises:
            KitError: Channels of the kit are none of the base's.
        """
        first, origin = self._file.again(name), self._origins[name]
        if origin.base is None or origin.part == "up":
            return first
        old, new = (self._picked(model, origin) for model in (self._base, self._tuned))
        if torch.equal(old.to(new.dtype), new):
            return first
        self.moved.add(name)
        if origin.part == "down":
            up_OR = self._file.again(name.replace(".down.", ".up."))
            return moved_within(up_OR, first, new.double() - old.double()).to(first.dtype)
        if torch.equal(first, old.to(first.dtype)):
            return new.to(first.dtype)
        return (first.double() + (new.double() - old.double())).to(first.dtype)

    def _picked(self, model: PreTrainedModel, origin: _Origin) -> Tensor:
        """What of a model's tensor has a place in the kit; matrices that are not whole as (out, in)."""
        assert origin.base is not None
        tensor = tensor_of(model, origin.base).cpu()
        if origin.part == "all":
            return tensor
        if tensor.ndim == 2 and isinstance(model.get_submodule(origin.base.rpartition(".")[0]), Conv1D):
            tensor = tensor.T
        if origin.part == "down":
            return tensor
        kept = self._kept(*origin.start)
        return tensor[kept] if origin.part == "rows" else tensor[:, kept]

    def _kept(self, start: str, own: str) -> Tensor:
        """The channels of a layer's MLP that the kit has, ascending: a kit tells how many, not which."""
        if start not in self._channels:
            names = [f"{path}.weight" for path in self._family.reads]
            of_kit = torch.cat([self._file.again(f"{start}{name}") for name in names], 1)
            whole = [_Origin(f"{own}{name}", "down") for name in names]
            of_base = torch.cat([self._picked(self._base, origin) for origin in whole], 1)
            self._channels[start] = _rows_of(of_kit, of_base.to(of_kit.dtype), start)
        return self._channels[start]


def _rows_of(some: Tensor, every: Tensor, where: str) -> Tensor:
    """Numbers of the rows of `every` that `some` has, in this order; of rows that are alike, the first."""
    kept, number = [], 0
    for row in some:
        while number < len(every) and not torch.equal(every[number], row):
            number += 1
        if number == len(every):
            raise KitError(f"channels of {where}mlp in the kit are none of the base's: give the base it was made of")
        kept.append(number)
        number += 1
    return torch.tensor(kept)
