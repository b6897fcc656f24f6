"""The IST update against a scalar oracle, and its draws against their distribution."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.base.numerics import draw_uniform
from siftune.methods.ist import maths


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def oracle_update(logits, sets, losses, lr):
    """The paper's update, number by number, in Python floats."""
    likelihoods = [math.exp(-loss) for loss in losses]
    mean = sum(likelihoods) / len(likelihoods)
    after = list(logits)
    for layers, likelihood in zip(sets, likelihoods, strict=True):
        reward = likelihood - mean
        for layer in layers:
            p = 1 / (1 + math.exp(logits[layer]))
            after[layer] -= lr * reward * p * (1 - p)
    return after


@given(data=st.data(), layers=st.integers(1, 12), lr=st.floats(0.01, 20))
def test_update_equals_oracle(data, layers, lr):
    logits = data.draw(st.lists(st.floats(-6, 6), min_size=layers, max_size=layers))
    size = data.draw(st.integers(1, layers))
    count = data.draw(st.integers(1, 4))
    one = st.lists(st.sampled_from(range(layers)), min_size=size, max_size=size, unique=True)
    sets = data.draw(st.lists(one, min_size=count, max_size=count))
    losses = data.draw(st.lists(st.floats(0, 8), min_size=count, max_size=count))
    before = torch.tensor(logits, dtype=torch.float64)
    kept = before.clone()
    rewards = maths.rewards(torch.tensor(losses, dtype=torch.float64))
    got = maths.update_importance(before, torch.tensor(sets), rewards, lr)
    expected = torch.tensor(oracle_update(logits, sets, losses, lr), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(before, kept)


def without_replacement_probabilities(weights, count):
    """Exact probability of each set, by summing over the orders in which it can be drawn."""
    chances = {}
    for order in itertools.permutations(range(len(weights)), count):
        left, chance = sum(weights), 1.0
        for layer in order:
            chance *= weights[layer] / left
            left -= weights[layer]
        key = tuple(sorted(order))
        chances[key] = chances.get(key, 0.0) + chance
    return chances


def chi_square(draw, chances, draws=20_000):
    counts = dict.fromkeys(chances, 0)
    for _ in range(draws):
        counts[tuple(draw().tolist())] += 1
    return sum((counts[k] - draws * p) ** 2 / (draws * p) for k, p in chances.items())


def test_active_layers_follow_the_sigmoid_of_importance():
    logits = torch.tensor([-2.0, -0.5, 0.0, 1.0, 2.0], dtype=torch.float64)
    chances = without_replacement_probabilities(torch.sigmoid(logits).tolist(), 2)
    source = generator()
    # 10 sets, 9 degrees of freedom: 27.9 is the 0.999 quantile
    assert chi_square(lambda: maths.draw_active(logits, 0.4, source), chances) < 27.9


def test_suppressed_sets_follow_the_sigmoid_of_unimportance():
    logits = torch.tensor([-2.0, -0.5, 0.0, 1.0, 2.0], dtype=torch.float64)
    chances = without_replacement_probabilities(torch.sigmoid(-logits).tolist(), 2)
    source = generator()
    assert chi_square(lambda: maths.draw_candidates(logits, 1, 0.4, source)[0], chances) < 27.9


def test_uniform_draw_is_uniform():
    chances = without_replacement_probabilities([1.0] * 5, 2)
    source = generator()
    assert chi_square(lambda: draw_uniform(5, 2, source), chances) < 27.9


@given(layers=st.integers(1, 9), suppressed=st.floats(0.01, 1), candidates=st.integers(1, 6), seed=st.integers(0, 99))
def test_candidates_are_distinct_and_as_many_as_exist(layers, suppressed, candidates, seed):
    sets = maths.draw_candidates(torch.zeros(layers, dtype=torch.float64), candidates, suppressed, generator(seed))
    size = max(1, int(suppressed * layers + 1e-9))
    assert sets.shape == (min(candidates, math.comb(layers, size)), size)
    assert len({tuple(s) for s in sets.tolist()}) == len(sets)
    assert all(len(set(s)) == size for s in sets.tolist())


def test_extreme_importance_still_draws():
    logits = torch.tensor([900.0, -900.0, 900.0, -900.0], dtype=torch.float64)
    assert maths.draw_active(logits, 0.5, generator()).tolist() == [0, 2]
    sets = maths.draw_candidates(logits, 3, 0.5, generator())
    assert sets[0].tolist() == [1, 3]


def test_draws_are_reproducible_and_leave_the_global_generator_alone():
    logits = torch.linspace(-1, 1, 20, dtype=torch.float64)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [maths.draw_active(logits, 0.25, source).tolist() for source in [generator(3)] for _ in range(5)]
    second = [maths.draw_active(logits, 0.25, source).tolist() for source in [generator(3)] for _ in range(5)]
    assert first == second
    assert len({tuple(layers) for layers in first}) > 1
    assert torch.equal(torch.get_rng_state(), before)
