"""Make a model's compressed middle: one pass over calibration rows, then one layer after the other.

Peak memory is the model, or one layer of a model whose layers are loaded as they run (`models/streamed.py`); the hidden
states and gradients that the pass keeps, or one layer's where they lie in a folder; and one layer's factors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from siftune.base.errors import RecipeError
from siftune.base.files import Progress
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator.assemble import EmulatorParts, assemble
from siftune.offsite.emulator.compress import (
    CompressedLayer,
    Compression,
    LayerCurvature,
    compress_layer,
    layer_curvature,
    whole,
)
from siftune.offsite.emulator.plan import EmulatorSettings, Step, plan
from siftune.offsite.emulator.record import record, replay
from siftune.offsite.emulator.recording import Recording
from siftune.offsite.emulator.split import Split


def emulators(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    choices: Sequence[EmulatorSettings],
    progress: Progress | None = None,
) -> list[EmulatorParts]:
    """Make several emulators of one model in memory, from one pass.

    Args:
        model: The base model, without adapters.
        batches: Calibration rows, as for `protocol.emulate`.
        choices: Settings of each; their splits must be the same.
        progress: Told of every batch and layer.

    Raises:
        InputError: On settings, rows or a model that cannot be used.
    """
    for choice in choices:
        choice.check()
    split = choices[0].split
    if any(choice.split != split for choice in choices):
        raise RecipeError("emulators made together have one split; make those of another split apart")
    whole = not all(choice.downwards for choice in choices)
    recording = record(model, batches, middle_of(model, split), progress, whole=whole)
    plans = [plan(model, recording, choice, progress) for choice in choices]
    made: list[dict[int, CompressedLayer]] = [{} for _ in choices]

    def take(place: int, number: int, layer: CompressedLayer) -> None:
        made[place][number] = layer

    compress_middle(model, recording, list(zip(choices, plans, strict=True)), take, progress)
    return [assemble(model, split, in_places(model, steps, by)) for steps, by in zip(plans, made, strict=True)]


def middle_of(model: PreTrainedModel, split: Split) -> range:
    """Numbers of the layers to compress.

    Raises:
        UnsupportedError: The model's family cannot be compressed.
        LayerError: The split leaves no middle.
    """
    family_of(model.config)
    return split.middle(len(find_layers(model).layers))


def compress_middle(
    model: PreTrainedModel,
    recording: Recording,
    jobs: Sequence[tuple[EmulatorSettings, Sequence[Step]]],
    take: Callable[[int, int, CompressedLayer], None],
    progress: Progress | None,
) -> None:
    """Go through the middle layers once, up, or down where the recording is not whole; compress each for every job.

    Args:
        model: The base model.
        recording: What its middle layers saw; a layer's part is freed when it is done.
        jobs: Settings of each, and the layers that it wants.
        take: Given each layer with the job's place and its number.
        progress: Told of every layer.
    """
    wanted = [(settings, {step.number: step for step in steps if step.same_as is None}) for settings, steps in jobs]
    numbers = sorted(set().union(*(steps for _, steps in wanted)), reverse=not recording.whole)
    slopes = any(settings.lambda_attn or settings.lambda_mlp for settings, _ in jobs)
    for done, number in enumerate(numbers, 1):
        here = {
            place: replace(settings, keep=steps[number].keep, shares=steps[number].shares)
            for place, (settings, steps) in enumerate(wanted)
            if number in steps
        }
        _compress_one(model, recording, number, here, slopes, take)
        recording.forget(number)  # used; memory goes down as the work goes on
        if progress is not None:
            progress("compression", done, len(numbers))


def _compress_one(
    model: PreTrainedModel,
    recording: Recording,
    number: int,
    jobs: Mapping[int, Compression],
    slopes: bool,
    take: Callable[[int, int, CompressedLayer], None],
) -> None:
    """Compress a layer for every job; nothing of it is left in memory."""
    layer, family = find_layers(model).layers[number], family_of(model.config)
    paths = list(dict.fromkeys(path for how in jobs.values() if how.keep < 1 for path in how.judged(family)))
    seen = layer_curvature(replay(layer, recording, number, paths), slopes) if paths else LayerCurvature()
    for place, how in jobs.items():
        take(place, number, compress_layer(layer, number, family, seen, how))


def in_places(
    model: PreTrainedModel, steps: Sequence[Step], by_number: dict[int, CompressedLayer]
) -> list[CompressedLayer]:
    """Put layers in the order of a plan."""
    layers = find_layers(model).layers
    return [
        by_number[step.number] if step.same_as is None else whole(layers[step.number], step.number, step.same_as)
        for step in steps
    ]
