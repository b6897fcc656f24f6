"""The stand-in accelerator itself: as strict as a real one, and it counts."""

import threading

import pytest
import torch
from support import standin

pytestmark = pytest.mark.compiled


def test_results_are_those_of_the_processor(device):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, generator=generator)
    for there in (device, "standin:1"):
        assert torch.equal((x.to(there) @ y.to(there).T).relu().cpu(), (x @ y.T).relu())


def test_tensors_of_different_devices_do_not_mix(device):
    here = torch.ones(3, device=device)
    for other in (torch.ones(3), torch.ones(3, device="standin:1")):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
    assert (here + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number goes with every device


def test_a_generator_belongs_to_its_device(device):
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=device, generator=torch.Generator())
    own = torch.Generator(device).manual_seed(3)
    first = torch.rand(3, device=device, generator=own)
    assert torch.equal(first, torch.rand(3, device=device, generator=own.manual_seed(3)))


def test_backward_runs_in_a_thread_of_the_device(device):
    names, x = [], torch.ones(3, device=device, requires_grad=True)
    x.register_hook(lambda grad: names.append(threading.current_thread() is threading.main_thread()))
    x.sum().backward()
    assert names == [False]


@pytest.mark.parametrize(
    ("do", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.repeat_interleave(x), 1),
        (lambda x: x.repeat_interleave(x, output_size=6), 0),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: torch.ones(3).to(x.device), 1),
        (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), 0),
        (lambda x: (x * 2).sum(), 0),
    ],
)
def test_waits_of_the_host_are_counted(device, do, waits):
    x = torch.arange(1, 4, device=device)
    with standin.observed() as seen:
        do(x)
    assert sum(seen.waits.values()) == waits, seen


def test_operations_are_counted_with_their_lines(device):
    x = torch.ones(3, 3, device=device)
    with standin.observed() as seen:
        x.T[0].view(3, 1)  # launches nothing
        torch._foreach_mul([x, x], 2.0)  # one launch
        torch.nn.functional.relu(x)
    assert [name for name, _ in seen.operations.elements()] == ["aten::_foreach_mul", "aten::relu"]


def test_memory_is_counted_and_limited(device):
    values = torch.zeros(100, device=device)
    other = torch.accelerator.memory_allocated(1)
    for index in range(standin.DEVICES):
        torch.accelerator.reset_peak_memory_stats(index)
    before = torch.accelerator.memory_allocated(0)
    assert before >= values.nbytes
    torch.zeros(200, device=device)
    assert torch.accelerator.memory_allocated(0) == before
    assert torch.accelerator.max_memory_allocated(0) == before + 800
    assert torch.accelerator.max_memory_allocated(1) == other
    with standin.limited(2000), pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1000, device=device)
    torch.zeros(1000, device=device)


def test_saved_tensors_return_to_the_device(device, tmp_path):
    torch.save(torch.arange(3.0, device=device), tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt").device == torch.device(device)
    assert torch.load(tmp_path / "x.pt", map_location="cpu").tolist() == [0, 1, 2]


def test_other_tests_see_no_accelerator():
    torch.ops.standin.set_available(False)
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0
