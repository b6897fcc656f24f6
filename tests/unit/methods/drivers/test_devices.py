"""What a model's layers on several devices must not do to state that is kept for all of them: mix devices."""

import pytest
import torch
from support.devices import DEVICES, OnDevice
from torch import nn

from siftune.base.numerics import all_finite
from siftune.methods.drivers.support import Support


def spread(*values):
    """Values of two layers, on a device each."""
    return [OnDevice(torch.tensor(value), device) for value, device in zip(values, DEVICES, strict=True)]


def values(tensors):
    return [tensor.held.tolist() for tensor in tensors]


def test_tensors_of_two_devices_do_not_meet():
    one, other = spread([1.0, 2.0], [3.0, 4.0])
    with pytest.raises(RuntimeError, match=r"meta:0.*meta:1"):
        one + other
    assert (one + other.to(one.device)).held.tolist() == [4.0, 6.0]
    assert float((other * 2).sum()) == 14.0


def test_all_finite():
    assert all_finite(spread([1.0, 2.0], [3.0]))
    assert not all_finite(spread([1.0, 2.0], [torch.inf]))
    assert not all_finite(spread([torch.nan], [1.0]))


def test_averaged_support():
    every, decay = 2, 0.9
    layers = [nn.Parameter(value) for value in spread([0.0, 0.0], [0.0])]
    support, found = Support(4, every), []
    for step in range(4):
        fresh = spread([1.0, 2.0 * step], [4.0])
        support.begin(step, lambda fresh=fresh: dict(zip(layers, fresh, strict=True)))
        found.append(values(support.gradients.values()))
        support.end()
    assert [value.device for value in support.average.values()] == [torch.device(d) for d in DEVICES]
    mean = 0.0
    for step in range(4):
        if step % every == 0:
            mean = 2.0 * step if not step else mean * decay**every + 2.0 * step * (1 - decay**every)
        assert found[step] == [[1.0, pytest.approx(mean)], [4.0]]
