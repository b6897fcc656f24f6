"""Write kits: one pass over calibration rows, then one layer after the other.

Finished layers, and the states that go from layer to layer, lie in a folder next to the kit until it is complete: an
interrupted run continues where it stopped. That folder is the owner's own, and no part of the kit.
Peak memory is the model, one layer's factors, and what goes into and comes back from one layer; at the end, the model
and the tensors of the kit.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.errors import ModelError
from siftune.base.files import Progress, refuse_full, write_beside
from siftune.base.work_folder import WorkFolder
from siftune.offsite.emulator.assemble import assemble, cast, converted
from siftune.offsite.emulator.compress import CompressedLayer
from siftune.offsite.emulator.make import compress_middle
from siftune.offsite.emulator.model import Base, LayerShape
from siftune.offsite.emulator.plan import EmulatorSettings, Step, plan
from siftune.offsite.emulator.record import record
from siftune.offsite.kit.config import make_config, scrub
from siftune.offsite.kit.folder import Kit, KitContents, write_kit
from siftune.offsite.kit.manifest import OWN_TEXTS, ROWS, Calibration, fingerprint
from siftune.offsite.kit.tensors import DTYPES
from siftune.offsite.kit.tokenizer import make_tokenizer, tokenizer_files

logger = logging.getLogger(__name__)

_READ = ("attention_mask", "input_ids", "labels")  # of a batch


@dataclass(frozen=True)
class KitOptions:
    """Options of a kit besides its emulator.

    Attributes:
        dtype: Dtype of the frozen part; None keeps the model's.
        outer_dtype: Dtype of the outer layers, also of what comes back; float32 does not round small updates away.
        calibration: What the manifest says of the calibration; None: rows, of the number and length of the batches.
    """

    dtype: torch.dtype | None = None
    outer_dtype: torch.dtype = torch.float32
    calibration: Calibration | None = None


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
        model: The base model, without adapters, its weights in memory.
        tokenizer: Its tokenizer.
        batches: Calibration rows, as a data collator gives them: (B, T) `input_ids`, `attention_mask`, `labels`.
        out: Folder of the kit; must be new or empty.
        settings: How the middle is compressed; GradOT in the whitened basis with measured shares at 0.7 by default.
        options: Dtypes, and what the manifest says of the calibration.
        progress: Called for every batch and layer.

    Returns:
        The kit, read back and checked.

    Raises:
        InputError: On settings, rows or a model that cannot be used, a folder that cannot be written to, or one beside
            it that has unfinished work of another kit.

    Example:
        >>> kit = emulate(base, tokenizer, batches, folder / "kit", EmulatorSettings(keep=0.5, split=Split(1, 1)))
        >>> kit.manifest.depth, kit.manifest.emulator_depth
        (4, 4)
    """
    settings, options, out = settings or EmulatorSettings(), options or KitOptions(), Path(out).expanduser()
    refuse_full(out)
    base = check_base(model, tokenizer, settings, options)
    identity, place = fingerprint(model), Path(os.path.abspath(out))  # "." has no name of its own
    facts = {
        "the base model": identity, "the calibration": _digest(batches), "the dtype": str(options.dtype),
        "the dtype to compute in": str(model.dtype), **asdict(settings),
    }  # fmt: skip
    work = WorkFolder(place.with_name(f".{place.name}.work"), "plan.json", "*.safetensors")
    with work.begin(facts):
        layers = _compressed(base, batches, settings, options, work, progress)
        parts = assemble(base, layers)
        contents = KitContents(
            parts.config, parts.split, parts.middle, converted(parts.frozen, options.dtype),
            converted(parts.outer, options.outer_dtype), tokenizer, base.depth, identity,
            options.calibration or calibrated_on(batches),
        )  # fmt: skip
        kit = write_kit(out, contents)
        work.remove()
    return kit


def check_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EmulatorSettings, options: KitOptions
) -> Base:
    """Refuse what no kit can be made of, before anything is computed.

    Raises:
        InputError: On the settings, the model's family, its config, its tokenizer or the dtype of the kit.
    """
    settings.check()
    base = Base(model, settings.split)
    make_tokenizer(tokenizer_files(tokenizer), model.config.get_text_config().vocab_size)
    names = {dtype: name for name, dtype in DTYPES.items()}
    if (dtype := options.dtype or model.dtype) not in names:
        raise ModelError(f"the model is in {dtype}, which no kit holds: give another data type with --kit-dtype")
    make_config(scrub(model.config, names[dtype]))
    return base


def calibrated_on(batches: Sequence[dict[str, Tensor]], seed: int | None = None) -> Calibration:
    """What a manifest says of the calibration: rows, or own texts of a seed."""
    shapes = [batch["input_ids"].shape for batch in batches]
    kind = ROWS if seed is None else OWN_TEXTS
    return Calibration(kind, sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes), seed)


def _digest(batches: Sequence[dict[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in (name for name in _READ if name in batch):
            digest.update(f"{name} {tuple(batch[name].shape)}".encode())
            digest.update(batch[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _compressed(
    base: Base,
    batches: Sequence[dict[str, Tensor]],
    settings: EmulatorSettings,
    options: KitOptions,
    work: WorkFolder,
    progress: Progress | None,
) -> list[CompressedLayer]:
    """The compressed middle; layers in the work folder are not compressed again."""

    def file(number: int) -> Path:
        return work.path / f"{number:04d}.safetensors"

    def take(_: int, number: int, layer: CompressedLayer) -> None:
        tensors = {name: cast(tensor, options.dtype).contiguous().cpu() for name, tensor in layer.tensors.items()}
        with write_beside(file(number)) as [beside]:
            save_file(tensors, beside, {"shape": json.dumps(asdict(layer.shape))})

    steps = [Step(*step) for step in work.state.get("steps", ())]
    if not steps or not all(file(step.number).exists() for step in steps):
        recording = record(base, batches, progress, work.path / "states")
        if not steps:
            steps = plan(base, recording, settings, progress)
            work.set_state(steps=[astuple(step) for step in steps])
        missing = [step for step in steps if not file(step.number).exists()]
        if len(missing) < len(steps):
            logger.info("%d of %d layers are there already", len(steps) - len(missing), len(steps))
        compress_middle(base, recording, [(settings, missing)], take, progress)
    return [_load(file(step.number)) for step in steps]


def _load(file: Path) -> CompressedLayer:
    """A compressed layer, whose tensors are read when they are asked for."""
    with safe_open(file, "pt") as opened:
        shape: dict[str, Any] = json.loads(opened.metadata()["shape"])
        index = {name: {"safetensors_file": str(file)} for name in opened.keys()}  # noqa: SIM118
    return CompressedLayer(LayerShape(**shape), OffloadedWeightsLoader(index=index))
