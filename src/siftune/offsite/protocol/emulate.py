"""Make emulators: one pass over calibration rows, then one layer after the other.

Peak memory is the model, the hidden states and gradients that the pass keeps (in bfloat16), and one layer's factors.
Finished layers lie on disk, so that a run that was cut short goes on where it was.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.errors import ModelError
from siftune.files import Progress, refuse_full, write_beside
from siftune.models.layers import find_layers
from siftune.offsite.emulator.assemble import assemble, cast
from siftune.offsite.emulator.compress import CompressedLayer
from siftune.offsite.emulator.make import compressed_layers, in_places, middle_of, record_middle
from siftune.offsite.emulator.model import LayerShape
from siftune.offsite.emulator.plan import EmulatorSettings, Step, plan
from siftune.offsite.kit.fingerprint import fingerprint
from siftune.offsite.kit.folder import Kit, KitContents, write_kit
from siftune.offsite.kit.tokenizer import make_tokenizer, tokenizer_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KitOptions:
    """What a kit is like, apart from its emulator.

    Attributes:
        dtype: Dtype of the frozen part; None keeps the model's.
        outer_dtype: Dtype of the outer layers, also of what comes back; float32 does not round small updates away.
        signing_key: Private key in PEM format to sign the kit with; None leaves it unsigned.
        store: Dtype of hidden states and gradients between pass and compression.
    """

    dtype: torch.dtype | None = None
    outer_dtype: torch.dtype = torch.float32
    signing_key: Path | None = None
    store: torch.dtype | None = torch.bfloat16


def emulate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[dict[str, Tensor]],
    out: str | Path,
    settings: EmulatorSettings | None = None,
    options: KitOptions | None = None,
    progress: Progress | None = None,
) -> Kit:
    """Compress a model's middle, and write a kit that a data owner can tune.

    Args:
        model: The base model, without adapters.
        tokenizer: Its tokenizer.
        batches: Calibration rows, as a data collator gives them: (B, T) `input_ids`, `attention_mask`, `labels`.
        out: Folder of the kit; must be new or empty.
        settings: How the middle is compressed; GradOT in the whitened basis at 0.7 by default.
        options: Dtypes and signature.
        progress: Told of every batch and layer.

    Returns:
        The kit, read back and checked.

    Raises:
        InputError: On settings, rows or a model that cannot be used, or a folder that cannot be written to.

    Example:
        >>> kit = emulate(base, tokenizer, batches, folder / "kit", EmulatorSettings(keep=0.5, split=Split(1, 1)))
        >>> kit.manifest.depth, kit.manifest.emulator_depth
        (4, 4)
    """
    settings, options, out = settings or EmulatorSettings(), options or KitOptions(), Path(out).expanduser()
    settings.check()
    middle_of(model, settings.split)
    refuse_full(out)
    make_tokenizer(tokenizer_files(tokenizer), model.config.get_text_config().vocab_size)  # refused now, not at the end
    identity = fingerprint(model)
    work = _Work(out, _key(identity, settings, options, batches))
    try:
        layers = _compressed(model, batches, settings, options, work, progress)
    finally:
        work.tidy()
    parts = assemble(model, settings.split, layers)
    contents = KitContents(
        parts.config, tokenizer, parts.split, parts.middle, len(find_layers(model).layers), identity,
        {name: cast(tensor, options.dtype) for name, tensor in parts.frozen.items()},
        {name: cast(tensor, options.outer_dtype) for name, tensor in parts.outer.items()},
    )  # fmt: skip
    kit = write_kit(out, contents, options.signing_key)
    work.remove()
    return kit


def _compressed(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    settings: EmulatorSettings,
    options: KitOptions,
    work: "_Work",
    progress: Progress | None,
) -> list[CompressedLayer]:
    """The compressed middle; layers that are on disk already are not made again."""
    steps = work.steps()
    numbers = {step.number for step in steps} if steps else set()
    if steps is None or any(not work.has(number) for number in numbers):
        recording = record_middle(model, batches, settings.split, options.store, progress)
        steps = plan(model, recording, settings)
        work.begin(steps)
        missing = [step for step in steps if not work.has(step.number)]
        if len(missing) < len(steps):
            logger.info("%d of %d layers are there already", len(steps) - len(missing), len(steps))
        for number, layers in compressed_layers(model, recording, [(settings, missing)], progress):
            if layers[0] is not None:
                work.add(number, layers[0])
    return in_places(model, steps, {number: work.load(number) for number in {s.number for s in steps}})


class _Work:
    """Finished layers of a kit that is being made, beside its place; the owner's own, nothing of it leaves.

    Args:
        out: Folder of the kit.
        key: What the layers depend on; those made with another key are thrown away.
    """

    def __init__(self, out: Path, key: str) -> None:
        place = Path(os.path.abspath(out))  # "." has no name of its own
        self.path = place.with_name(f".{place.name}.work")
        self._key = key
        self._plan = self.path / "plan.json"
        try:
            if self.path.exists() and self._read().get("key") != key:
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
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
        content = {"key": self._key, "steps": [[s.number, s.keep, s.same_as] for s in steps]}
        self._plan.write_text(json.dumps(content), encoding="utf-8")

    def has(self, number: int) -> bool:
        """Whether a layer is there."""
        return self._file(number).exists()

    def add(self, number: int, layer: CompressedLayer) -> None:
        """Keep a layer; a file is there whole or not at all."""
        shape = json.dumps(asdict(layer.shape))
        with write_beside(self._file(number)) as [beside]:
            save_file({n: t.contiguous().cpu() for n, t in layer.tensors.items()}, beside, {"shape": shape})

    def load(self, number: int) -> CompressedLayer:
        """A layer that is there."""
        from safetensors import safe_open

        with safe_open(self._file(number), "pt") as file:
            shape: dict[str, Any] = json.loads(file.metadata()["shape"])
        shape["biased"] = tuple(shape["biased"])
        return CompressedLayer(LayerShape(**shape), load_file(self._file(number)))

    def tidy(self) -> None:
        """Leave nothing where nothing was made."""
        with contextlib.suppress(OSError):  # there is something
            self.path.rmdir()

    def remove(self) -> None:
        """Throw it all away."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.path / f"{number:04d}.safetensors"

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._plan.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _key(identity: str, settings: EmulatorSettings, options: KitOptions, batches: Sequence[dict[str, Tensor]]) -> str:
    """What a compressed layer depends on, as a hash."""
    digest = hashlib.sha256(f"{identity} {settings} {options.store}".encode())
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)}".encode())
            digest.update(batch[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
