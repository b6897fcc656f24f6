"""RST: uniform draws of a share of the layers."""

import itertools
from collections import Counter

import pytest
from support.trainers import adapted

from siftune import RST

DRAWS = 4000


def drawn(steps=DRAWS, **settings):
    with RST(**settings).attach(adapted(layers=6)) as sift:
        return [sift.last.layers, *(sift.step().layers for _ in range(steps - 1))]


def test_every_set_of_layers_is_equally_likely():
    counts = Counter(drawn(active=0.34))
    sets = list(itertools.combinations(range(6), 2))
    assert set(counts) == set(sets)
    chance = 1 / len(sets)
    for layers in sets:
        assert counts[layers] / DRAWS == pytest.approx(chance, abs=4 * (chance * (1 - chance) / DRAWS) ** 0.5)


def test_draws_do_not_depend_on_the_previous_one():
    draws = drawn(active=0.17)
    again = sum(one == other for one, other in itertools.pairwise(draws)) / DRAWS
    assert again == pytest.approx(1 / 6, abs=4 * (5 / 36 / DRAWS) ** 0.5)


@pytest.mark.parametrize(("active", "count"), [(0.01, 1), (0.34, 2), (1, 6), (1.0, 6)])
def test_a_share_of_the_layers_is_drawn(active, count):
    assert {len(layers) for layers in drawn(20, active=active)} == {count}


def test_the_seed_decides():
    assert drawn(20, seed=1) == drawn(20, seed=1) != drawn(20, seed=2)
