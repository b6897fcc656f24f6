"""Steps made longer or taken back, and the norm of several gradients."""

import pytest
import torch
from torch import nn

from siftune.methods.layer_steps import ScaledSteps, gradient_norm


def moved(before, after, length):
    parameter = nn.Parameter(before.clone())
    steps = ScaledSteps({parameter: length})
    with torch.no_grad():
        parameter.copy_(after)
    steps.apply()
    return parameter.detach()


@pytest.mark.parametrize("length", [0.5, 1.5, 4.0, 30.0])
def test_a_step_is_so_many_times_as_long(length):
    before, after = torch.randn(2, 50, dtype=torch.float64).unbind()
    torch.testing.assert_close(moved(before, after, length), before + length * (after - before), rtol=1e-13, atol=1e-13)


def test_length_0_takes_back_1_leaves_and_what_has_not_moved_stays_bit_for_bit():
    before, after = torch.randn(2, 1000).unbind()
    assert torch.equal(moved(before, after, 0.0), before)
    assert torch.equal(moved(before, after, 1.0), after)
    assert torch.equal(moved(before, before, 4 / 3), before)


def test_a_step_is_scaled_once():
    parameter = nn.Parameter(torch.zeros(3))
    steps = ScaledSteps({parameter: 2.0})
    parameter.data += 1
    steps.apply()
    steps.apply()
    assert parameter.tolist() == [2, 2, 2]


def test_norm_of_gradients_together():
    parameters = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))]
    assert gradient_norm(parameters) == 0
    parameters[0].grad, parameters[1].grad = torch.randn(4, 3), torch.randn(5)
    whole = torch.cat([p.grad.flatten() for p in parameters[:2]])
    assert float(gradient_norm(parameters)) == pytest.approx(float(whole.norm()), rel=1e-6)
    half = nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
    half.grad = torch.full_like(half, 300.0)  # the square of which float16 cannot hold, nor the norm
    assert float(gradient_norm([half, half])) == pytest.approx(300 * 20_000**0.5, rel=1e-5)
