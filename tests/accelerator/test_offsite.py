"""The way of a kit on the stand-in accelerator: `emulate`, `train` and `plug` lead to the model of the CPU."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from support import emulators, standin
from support.commands import EMULATE, TRAIN, siftune

from siftune.offsite.emulator.model import Base, Split
from siftune.offsite.emulator.record import record
from siftune.offsite.exchange.plug import plug_in

pytestmark = pytest.mark.compiled


def plugged(capsys, base, rows, folder, count):
    """Base and plugged model, after a kit of the base was tuned that is calibrated on some of the rows."""
    kit, run, tuned = folder / "kit", folder / "run", folder / "tuned"
    siftune(capsys, "emulate", "--model", base, "--calibration", rows, "--out", kit, *EMULATE, "--rows", count)
    siftune(capsys, "train", "--model", kit, "--train", rows, "--out", run, *TRAIN)
    siftune(capsys, "plug", "--model", base, "--kit", kit, "--return", run / "return", "--out", tuned)
    return load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")


@pytest.mark.parametrize("count", [6, 24])
def test_a_plugged_model_is_that_of_the_cpu(base, rows, tmp_path, capsys, count):
    """Of more rows, the curvature is kept between measuring and compression."""
    with standin.observed() as seen:
        before, there = plugged(capsys, base, rows, tmp_path / "there", count)
    assert sum(seen.operations.values()) > 1000
    with standin.hidden():
        _, here = plugged(capsys, base, rows, tmp_path / "here", count)
    moved = {name for name, value in before.items() if not torch.equal(value, there[name])}
    assert len(moved) == 2 * 9  # first and last layer: seven matrices and two norms
    for name, value in here.items():
        assert (there[name] - value).abs().max() < 1e-4, name


@pytest.mark.parametrize("count", [6, 24])
def test_a_kit_from_a_device_without_float64(base, rows, tmp_path, capsys, count):
    """What needs float64 is solved on the CPU."""
    arguments = ["--model", base, "--calibration", rows, *EMULATE, "--rows", count]
    siftune(capsys, "emulate", *arguments, "--out", tmp_path / "with")
    with standin.without_float64():
        siftune(capsys, "emulate", *arguments, "--out", tmp_path / "without")
    expected, found = (load_file(tmp_path / name / "emulator.safetensors") for name in ("with", "without"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["whole", "thin"])
def test_a_return_on_a_device_without_float64(device, tmp_path, kind):
    model = emulators.base(layers=3, vocab_size=300).float()
    kit = emulators.made_kit(model, tmp_path / "kit")
    returned = (moved_layers if kind == "whole" else factors)(kit)
    expected, found = copy.deepcopy(model), copy.deepcopy(model).to(device)
    plug_in(expected, kit, returned, 100.0)
    with standin.without_float64():
        plug_in(found, kit, returned, 100.0)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].cpu(), tensor)


def moved_layers(kit):
    """The kit's outer layers, every number of it moved."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(kit.path / "adapter.safetensors")
    return {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def factors(kit):
    """Factors of LoRA for every matrix of the kit's outer layers."""
    generator = torch.Generator().manual_seed(0)
    matrices = {name: t for name, t in load_file(kit.path / "adapter.safetensors").items() if t.ndim == 2}
    shapes = {f"{name}.up": (len(t), 2) for name, t in matrices.items()}
    shapes |= {f"{name}.down": (2, t.shape[1]) for name, t in matrices.items()}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_masks_of_the_recording_are_in_main_memory(device):
    """One for all layers of a batch, since they grow with rows and squared length."""
    base = Base(emulators.base(layers=4).to(device), Split(1, 1))
    batches = [
        {name: value.to(device) for name, value in batch.items()}
        for batch in emulators.calibration(base.model, count=5, rows=8)
    ]
    recording = record(base, batches)
    masks = [
        value
        for calls in recording.calls
        for call in calls
        for value in call.kwargs.values()
        if isinstance(value, torch.Tensor) and value.ndim == 4
    ]
    assert {mask.device.type for mask in masks} == {"cpu"}
    assert len(masks) == 4 * len({id(mask) for mask in masks}) == 4 * len(batches)
