"""GREATS' greedy choice, against the loop that its paper describes and against all orders."""

from itertools import permutations

import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.methods.greats import greedy

COUNTS = {"count": st.integers(1, 7), "size": st.integers(1, 5), "share": st.floats(0, 1)}


def drawn(count, size, seed):
    """Gradients of `count` samples and of a support set, float64."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return vectors, torch.randn(size, generator=generator, dtype=torch.float64)


def gain(vectors, support, before, sample, step):
    """What a sample adds to those before it."""
    return float(support @ vectors[sample]) - step * sum(float(vectors[sample] @ vectors[j]) for j in before)


def plain_greedy(vectors, support, count, step):
    """Add the sample with which Σ⟨h, g⟩ less half the step times the overlap of all different pairs is highest."""

    def utility(rows):
        pairs = sum(float(vectors[i] @ vectors[j]) for i in rows for j in rows if i != j)
        return sum(float(support @ vectors[i]) for i in rows) - step / 2 * pairs

    chosen = []
    for _ in range(count):
        others = [i for i in range(len(vectors)) if i not in chosen]
        chosen.append(max(others, key=lambda i: utility([*chosen, i])))
    return chosen


def choose(vectors, support, count, step, live=None):
    live_B = torch.ones(len(vectors), dtype=torch.bool) if live is None else torch.tensor(live)
    return greedy(vectors @ support, vectors @ vectors.T, live_B, count, step).tolist()


@given(**COUNTS, step=st.floats(0, 4), seed=st.integers(0, 999))
def test_it_is_the_plain_greedy_loop(count, size, share, step, seed):
    vectors, support = drawn(count, size, seed)
    chosen = max(1, round(share * count))
    assert choose(vectors, support, chosen, step) == plain_greedy(vectors, support, chosen, step)


@given(count=st.integers(1, 5), size=st.integers(1, 5), share=st.floats(0, 1), step=st.floats(0, 4),
       seed=st.integers(0, 999))  # fmt: skip
def test_no_order_of_samples_has_higher_gains_one_after_the_other(count, size, share, step, seed):
    vectors, support = drawn(count, size, seed)

    def gains(order):
        return [gain(vectors, support, order[:place], sample, step) for place, sample in enumerate(order)]

    chosen = max(1, round(share * count))
    best = max(permutations(range(count), chosen), key=gains)
    assert choose(vectors, support, chosen, step) == list(best)


@given(**COUNTS, seed=st.integers(0, 999))
def test_without_a_step_it_takes_the_highest_products(count, size, share, seed):
    vectors, support = drawn(count, size, seed)
    chosen = max(1, round(share * count))
    assert choose(vectors, support, chosen, 0.0) == (vectors @ support).topk(chosen).indices.tolist()


@given(**COUNTS, dead=st.integers(0, 6), step=st.floats(0, 4), seed=st.integers(0, 999))
def test_samples_without_a_gradient_stand_back(count, size, share, dead, step, seed):
    vectors, support = drawn(count, size, seed)
    live = [place >= dead for place in range(count)]
    vectors[:dead] = 0  # their product, 0, is higher than many others'
    chosen = max(1, round(share * count))
    order = choose(vectors, support, chosen, step, live)
    assert len(set(order)) == chosen
    assert sum(live[sample] for sample in order) == min(chosen, sum(live))
    best = plain_greedy(vectors[dead:], support, min(chosen, sum(live)), step)
    assert order[: len(best)] == [sample + dead for sample in best]


def test_a_long_step_parts_samples_that_are_alike():
    vectors = torch.tensor([[2.0, 0.0], [1.9, 0.0], [0.0, 0.5]], dtype=torch.float64)
    support = torch.ones(2, dtype=torch.float64)
    assert choose(vectors, support, 2, 0.0) == [0, 1]
    assert choose(vectors, support, 2, 1.0) == [0, 2]
