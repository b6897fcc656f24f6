"""Make emulators: one pass over calibration rows, then one layer after the other.

What goes from layer to layer lies on disk, and so do finished layers: a run that was cut short goes on where it was.
Peak memory is the model and one layer's factors; of a model whose layers are loaded as they run (`models/streamed.py`)
the embeddings, the head, and one layer with its factors.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.files import Progress, refuse_full
from siftune.models.layers import find_layers
from siftune.offsite.emulator.assemble import assemble, converted
from siftune.offsite.emulator.compress import CompressedLayer
from siftune.offsite.emulator.make import compress_middle, in_places, middle_of
from siftune.offsite.emulator.plan import EmulatorSettings, plan
from siftune.offsite.emulator.record import record
from siftune.offsite.exchange.work import Work
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
    """

    dtype: torch.dtype | None = None
    outer_dtype: torch.dtype = torch.float32
    signing_key: Path | None = None


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
        model: The base model, without adapters; its layers may be loaded as they run (`load_model(…, streamed=True)`).
        tokenizer: Its tokenizer.
        batches: Calibration rows, as a data collator gives them: (B, T) `input_ids`, `attention_mask`, `labels`.
        out: Folder of the kit; must be new or empty.
        settings: How the middle is compressed; GradOT in the whitened basis at 0.7 by default.
        options: Dtypes and signature.
        progress: Told of every batch and layer.

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
    settings.check()
    middle_of(model, settings.split)
    refuse_full(out)
    make_tokenizer(tokenizer_files(tokenizer), model.config.get_text_config().vocab_size)  # refused now, not at the end
    identity = fingerprint(model)
    with Work(out, _made_of(identity, settings, options, batches)) as work:
        layers = _compressed(model, batches, settings, options, work, progress)
    parts = assemble(model, settings.split, layers)
    contents = KitContents(
        parts.config, parts.split, parts.middle, converted(parts.frozen, options.dtype),
        converted(parts.outer, options.outer_dtype), tokenizer, len(find_layers(model).layers), identity,
    )  # fmt: skip
    kit = write_kit(out, contents, options.signing_key)
    work.remove()
    return kit


def _compressed(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    settings: EmulatorSettings,
    options: KitOptions,
    work: Work,
    progress: Progress | None,
) -> list[CompressedLayer]:
    """The compressed middle; layers that are on disk already are not made again."""
    steps = work.steps()
    numbers = {step.number for step in steps} if steps else set()
    if steps is None or any(not work.has(number) for number in numbers):
        middle = middle_of(model, settings.split)
        recording = record(model, batches, middle, progress, work.states, not settings.downwards)
        steps = steps or plan(model, recording, settings, progress)
        work.begin(steps)
        missing = [step for step in steps if not work.has(step.number)]
        if len(missing) < len(steps):
            logger.info("%d of %d layers are there already", len(steps) - len(missing), len(steps))
        compress_middle(
            model, recording, [(settings, missing)], lambda _, n, layer: work.add(n, layer, options.dtype), progress
        )
    return in_places(model, steps, {number: work.load(number) for number in {s.number for s in steps}})


def _made_of(
    identity: str, settings: EmulatorSettings, options: KitOptions, batches: Sequence[dict[str, Tensor]]
) -> dict[str, Any]:
    """What compressed layers depend on."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)}".encode())
            digest.update(batch[name].cpu().contiguous().numpy().tobytes())
    named = {"the base model": identity, "the calibration": digest.hexdigest(), "the dtype": str(options.dtype)}
    return {**named, **asdict(settings)}
