"""What a kit that is being made has got so far: finished layers, and what goes from layer to layer.

It lies beside the kit's place until the kit is whole, and is the owner's own: nothing of it leaves. Every file is there
whole or not at all, so a run that was cut, however it ended, goes on from the layer that it was at. Work with other
settings, another base or other rows is not thrown away, since hours may be in it, but refused by what differs.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors import safe_open
from safetensors.torch import save_file

from siftune.base.errors import InputError, ModelError, RecipeError
from siftune.base.files import write_beside
from siftune.offsite.emulator.assemble import cast
from siftune.offsite.emulator.compress import CompressedLayer
from siftune.offsite.emulator.model import LayerShape
from siftune.offsite.emulator.plan import Step


class Work:
    """Work on the kit whose folder is `out`; `made_of` is what its layers depend on, by name, in plain types.

    What goes from layer to layer lies in the folder `states`.

    Raises:
        RecipeError: There is work that was made of something else.
        ModelError: The folder cannot be written to.
    """

    def __init__(self, out: Path, made_of: Mapping[str, Any]) -> None:
        place = Path(os.path.abspath(out))  # "." has no name of its own
        self.path = place.with_name(f".{place.name}.work")
        self.states = self.path / "states"
        self._plan = self.path / "plan.json"
        self._made_of = json.loads(json.dumps(made_of))
        try:
            if self._is_worth_keeping():
                self._refuse_other()
            else:
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir(parents=True)
                self._keep(None)
        except OSError as error:
            raise ModelError(
                f"{self.path} cannot be written to ({error.strerror}); give another folder with --out"
            ) from error

    def steps(self) -> list[Step] | None:
        """The plan, if one was made."""
        steps = self._read().get("steps")
        return [Step(*step) for step in steps] if steps else None

    def begin(self, steps: Sequence[Step]) -> None:
        """Keep the plan."""
        self._keep([astuple(step) for step in steps])

    def has(self, number: int) -> bool:
        """Whether a layer is there."""
        return self._file(number).exists()

    def add(self, number: int, layer: CompressedLayer, dtype: torch.dtype | None) -> None:
        """Keep a layer, of a number in the base, in the dtype that the kit will have; None leaves it."""
        tensors = {name: cast(tensor, dtype).contiguous().cpu() for name, tensor in layer.tensors.items()}
        with write_beside(self._file(number)) as [beside]:
            save_file(tensors, beside, {"shape": json.dumps(asdict(layer.shape))})

    def load(self, number: int) -> CompressedLayer:
        """A layer that is there; its tensors are read as they are asked for."""
        with safe_open(self._file(number), "pt") as file:
            shape: dict[str, Any] = json.loads(file.metadata()["shape"])
            index = {name: {"safetensors_file": str(self._file(number))} for name in file.keys()}  # noqa: SIM118
        shape["biased"] = tuple(shape["biased"])
        return CompressedLayer(LayerShape(**shape), OffloadedWeightsLoader(index=index))

    def __enter__(self) -> "Work":
        """Begin, or go on."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave nothing where nothing was made, or can be made: of rows, say, whose loss is not a number."""
        if (kind is not None and issubclass(kind, InputError)) or not self._is_worth_keeping():
            self.remove()

    def remove(self) -> None:
        """Throw it all away."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _is_worth_keeping(self) -> bool:
        return any(self.path.rglob("*.safetensors"))

    def _refuse_other(self) -> None:
        before = self._read().get("made_of")
        before = before if isinstance(before, dict) else {}
        for name in {**before, **self._made_of}:
            old, new = (_shown(side.get(name)) for side in (before, self._made_of))
            if old != new:
                raise RecipeError(
                    f"{self.path} holds unfinished work in which {name} is {old}, but now it is {new}: "
                    "give what was given then to go on with it, or delete that folder to begin anew"
                )

    def _file(self, number: int) -> Path:
        return self.path / f"{number:04d}.safetensors"

    def _keep(self, steps: Any) -> None:
        with write_beside(self._plan) as [beside]:
            beside.write_text(json.dumps({"made_of": self._made_of, "steps": steps}), encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._plan.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _shown(value: Any) -> str:
    """A value in a message; of a hash its start."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else json.dumps(value)
