"""The dtype of sums, and the draw without replacement against every order it could have had."""

import itertools
import math

import pytest
import torch

from siftune.base.numerics import gumbel_top_k, wide_dtype, widened


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
