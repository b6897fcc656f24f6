"""The dtype of sums, a norm of gradients, and the draw without replacement against every order it could have had."""

import itertools
import math

import pytest
import torch
from torch import nn

from siftune.base.numerics import gradient_norm, gumbel_top_k, wide_dtype, widened


def sequential_probabilities(weights, count):
    """Probability of every set of `count` indices: each order of drawing, one after the other, added up."""
    probabilities = dict.fromkeys(itertools.combinations(range(len(weights)), count), 0.0)
    for order in itertools.permutations(range(len(weights)), count):
        left, probability = sum(weights), 1.0
        for index in order:
            probability *= weights[index] / left
            left -= weights[index]
        probabilities[tuple(sorted(order))] += probability
    return probabilities


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sets_come_as_often_as_in_sequential_draws(count):
    weights, draws = [0.5, 1.0, 2.0, 4.0], 20_000
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    uniform = torch.rand(draws, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = [tuple(gumbel_top_k(log_weights, row, count).tolist()) for row in uniform]
    for chosen, probability in sequential_probabilities(weights, count).items():
        spread = math.sqrt(probability * (1 - probability) / draws)
        assert abs(drawn.count(chosen) / draws - probability) < 4 * spread


def test_extreme_weights_neither_tie_nor_turn_nan():
    log_weights = torch.tensor([-1e5, 1e5, -1e8, 0.0, -torch.inf], dtype=torch.float64)
    for uniform in (0.0, 1 - 2**-53, 0.5):
        uniform_all = torch.full((5,), uniform, dtype=torch.float64)
        assert gumbel_top_k(log_weights, uniform_all, 2).tolist() == [1, 3]
        assert gumbel_top_k(log_weights, uniform_all, 4).tolist() == [0, 1, 2, 3]


def test_a_uniform_zero_loses_against_all_others():
    uniform = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    assert gumbel_top_k(torch.zeros(3, dtype=torch.float64), uniform, 2).tolist() == [0, 2]


def test_a_certain_sample_beats_a_uniform_zero_with_a_lower_weight():
    """The noise is bounded below: −log(−log 1e-300) ≈ −6.5, that of a uniform number near 1 is 37."""
    log_weights = torch.tensor([50.0, 0.0], dtype=torch.float64)
    assert gumbel_top_k(log_weights, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1).tolist() == [0]


def test_indices_are_ascending_and_distinct():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        drawn = gumbel_top_k(torch.zeros(9), torch.rand(9, dtype=torch.float64, generator=generator), 5)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == sorted(set(drawn.tolist()))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_widens_without_a_change_of_value(dtype, wide):
    values = torch.tensor([1.0, -0.3, 6e4, 1e-7]).to(dtype)
    assert wide_dtype(values) == widened(values).dtype == wide
    assert torch.equal(widened(values).to(dtype), values)
    assert torch.equal(widened(values).double(), values.double())


def test_norm_of_gradients_together():
    parameters = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))]
    assert gradient_norm(parameters) == 0
    parameters[0].grad, parameters[1].grad = torch.randn(4, 3), torch.randn(5)
    whole = torch.cat([p.grad.flatten() for p in parameters[:2]])
    assert float(gradient_norm(parameters)) == pytest.approx(float(whole.norm()), rel=1e-6)
    half = nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
    half.grad = torch.full_like(half, 300.0)  # the square of which float16 cannot hold, nor the norm
    assert float(gradient_norm([half, half])) == pytest.approx(300 * 20_000**0.5, rel=1e-5)
