"""Make a model's compressed middle: one pass over calibration rows, then one layer after the other.

Peak memory is the model, the hidden states and gradients that the pass keeps, and one layer's factors.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from siftune.errors import RecipeError
from siftune.files import Progress
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator.assemble import EmulatorParts, assemble
from siftune.offsite.emulator.compress import CompressedLayer, compress_layer, layer_curvature, whole
from siftune.offsite.emulator.plan import EmulatorSettings, Step, plan
from siftune.offsite.emulator.record import Recording, record, replay
from siftune.offsite.emulator.split import Split


def emulators(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    choices: Sequence[EmulatorSettings],
    store: torch.dtype | None = torch.bfloat16,
    progress: Progress | None = None,
) -> list[EmulatorParts]:
    """Make several emulators of one model in memory, from one pass.

    Args:
        model: The base model, without adapters.
        batches: Calibration rows, as for `protocol.emulate`.
        choices: Settings of each; their splits must be the same.
        store: Dtype in which hidden states and gradients are kept; None keeps the model's.
        progress: Told of every batch and layer.

    Raises:
        InputError: On settings, rows or a model that cannot be used.
    """
    for choice in choices:
        choice.check()
    split = choices[0].split
    if any(choice.split != split for choice in choices):
        raise RecipeError("emulators made together have one split; make those of another split apart")
    recording = record_middle(model, batches, split, store, progress)
    plans = [plan(model, recording, choice) for choice in choices]
    made: list[dict[int, CompressedLayer]] = [{} for _ in choices]
    for number, layers in compressed_layers(model, recording, list(zip(choices, plans, strict=True)), progress):
        for by_number, layer in zip(made, layers, strict=True):
            if layer is not None:
                by_number[number] = layer
    return [assemble(model, split, in_places(model, steps, by)) for steps, by in zip(plans, made, strict=True)]


def record_middle(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    split: Split,
    store: torch.dtype | None,
    progress: Progress | None,
) -> Recording:
    """Run the calibration rows through the model, once."""
    return record(model, batches, middle_of(model, split), store, progress)


def middle_of(model: PreTrainedModel, split: Split) -> range:
    """Numbers of the layers to compress.

    Raises:
        UnsupportedError: The model's family cannot be compressed.
        LayerError: The split leaves no middle.
    """
    family_of(model.config)
    return split.middle(len(find_layers(model).layers))


def compressed_layers(
    model: PreTrainedModel,
    recording: Recording,
    jobs: Sequence[tuple[EmulatorSettings, Sequence[Step]]],
    progress: Progress | None,
) -> Iterator[tuple[int, list[CompressedLayer | None]]]:
    """Go through the middle layers once; compress each for every job that has it."""
    layers, family = find_layers(model).layers, family_of(model.config)
    own = [{step.number: step for step in steps if step.same_as is None} for _, steps in jobs]
    numbers = sorted(set().union(*own))
    slopes = any(settings.lambda_attn or settings.lambda_mlp for settings, _ in jobs)
    for done, number in enumerate(numbers, 1):
        layer = layers[number]
        needed = any(number in steps and steps[number].keep < 1 for steps in own)
        seen = layer_curvature(replay(layer, recording, number, family.matrices), slopes) if needed else None
        compressed: list[CompressedLayer | None] = []
        with _here(layer):
            for (settings, _), steps in zip(jobs, own, strict=True):
                step = steps.get(number)
                if step is None:
                    compressed.append(None)
                elif step.keep >= 1 or seen is None:
                    compressed.append(whole(layer, number))
                else:
                    compressed.append(compress_layer(layer, number, family, seen, replace(settings, keep=step.keep)))
        recording.visits[number].clear()  # used; memory goes down as the work goes on
        yield number, compressed
        if progress is not None:
            progress("compression", done, len(numbers))


def in_places(
    model: PreTrainedModel, steps: Sequence[Step], by_number: dict[int, CompressedLayer]
) -> list[CompressedLayer]:
    """Put layers in the order of a plan."""
    layers = find_layers(model).layers
    return [
        by_number[step.number] if step.same_as is None else whole(layers[step.number], step.number, step.same_as)
        for step in steps
    ]


def _here(layer: Any) -> ExitStack:
    """Have the weights of a layer here that accelerate keeps elsewhere, for the time of a block."""
    from accelerate.utils import align_module_device

    stack = ExitStack()
    for module in layer.modules():
        stack.enter_context(align_module_device(module))
    return stack
