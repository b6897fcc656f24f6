"""Make a model's compressed middle: one pass over calibration rows, then one layer after the other.

Peak memory is the model; the hidden states, gradients and curvature that the passes keep, or one layer's where they
lie in a folder; and one layer's factors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from siftune.base.errors import RecipeError
from siftune.base.files import Progress
from siftune.offsite.emulator.assemble import EmulatorParts, assemble
from siftune.offsite.emulator.compress import CompressedLayer, Compression, compress_layer
from siftune.offsite.emulator.curvature import LayerCurvature, Sums, kept_whole
from siftune.offsite.emulator.model import Base, weight_OI
from siftune.offsite.emulator.plan import EmulatorSettings, Step, measure, plan
from siftune.offsite.emulator.record import Recording, record, replay


def emulators(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    choices: Sequence[EmulatorSettings],
    progress: Progress | None = None,
) -> list[EmulatorParts]:
    """Make several emulators of one model in memory, from one pass.

    Args:
        model: The base model, without adapters.
        batches: Calibration rows, as for `exchange.emulate`.
        choices: Settings of each; their splits must be the same.
        progress: Called for every batch and layer.

    Raises:
        InputError: On settings, rows or a model that cannot be used.
    """
    for choice in choices:
        choice.check()
    base = Base(model, choices[0].split)
    if any(choice.split != base.split for choice in choices):
        raise RecipeError("emulators of one pass have one split: make those of another split in another pass")
    recording = record(base, batches, progress)
    measure(base, recording, choices, progress)
    plans = [plan(base, recording, choice) for choice in choices]
    layers: list[dict[int, CompressedLayer]] = [{} for _ in choices]

    def take(place: int, number: int, layer: CompressedLayer) -> None:
        layers[place][number] = layer

    compress_middle(base, recording, list(zip(choices, plans, strict=True)), take, progress)
    return [assemble(base, [by[step.number] for step in steps]) for steps, by in zip(plans, layers, strict=True)]


def compress_middle(
    base: Base,
    recording: Recording,
    jobs: Sequence[tuple[EmulatorSettings, Sequence[Step]]],
    take: Callable[[int, int, CompressedLayer], None],
    progress: Progress | None,
) -> None:
    """Compress each middle layer for every job, in one pass from the last to the first.

    Args:
        base: The base model.
        recording: Of its middle layers; a layer's part is freed after use.
        jobs: Settings of each, and the layers to compress.
        take: Called with the job's place, the layer's number and the layer.
        progress: Called at the start and after every layer.
    """
    wanted = [(settings, {step.number: step for step in steps}) for settings, steps in jobs]
    numbers = sorted(set().union(*(steps for _, steps in wanted)), reverse=True)
    slopes = any(settings.lambda_attn or settings.lambda_mlp for settings, _ in jobs)
    if progress is not None:
        progress("compression", 0, len(numbers))
    for done, number in enumerate(numbers, 1):
        here = {
            place: replace(settings, keep=steps[number].keep, shares=steps[number].shares)
            for place, (settings, steps) in enumerate(wanted)
            if number in steps
        }
        _compress_one(base, recording, number, here, slopes, take)
        recording.forget(number)
        if progress is not None:
            progress("compression", done, len(numbers))


def _compress_one(
    base: Base,
    recording: Recording,
    number: int,
    jobs: Mapping[int, Compression],
    slopes: bool,
    take: Callable[[int, int, CompressedLayer], None],
) -> None:
    """Compress a layer for every job; a function of its own, so that nothing of the layer is left in memory."""
    paths = list(dict.fromkeys(path for how in jobs.values() if how.keep < 1 for path in how.judged(base.family)))
    seen = _curvature(base, recording, number, paths, slopes) if paths else LayerCurvature()
    for place, how in jobs.items():
        take(place, number, compress_layer(base, number, seen, how))


def _curvature(base: Base, recording: Recording, number: int, paths: Sequence[str], slopes: bool) -> LayerCurvature:
    """Curvature of a layer's matrices, kept since costs were measured, or computed."""
    device = weight_OI(base.layers[number].get_submodule(paths[0])).device
    kept = None if slopes else kept_whole(recording.curvature, number, paths, device)
    if kept is not None:
        return kept
    sums = Sums(recording.positions, slopes)
    replay(base, recording, number, paths, sums.add)
    return sums.curvature()
