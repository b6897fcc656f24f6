"""RST: uniform draws, of as many layers as the share says."""

import itertools
from collections import Counter

import pytest
from support.trainers import adapted

from siftune import RST
from siftune.base.errors import RecipeError

DRAWS = 4000


def drawn(steps=DRAWS, **settings):
    with RST(**settings).attach(adapted(layers=6)) as sift:
        return [sift.last.layers, *(sift.step().layers for _ in range(steps - 1))]


def test_every_set_of_layers_is_drawn_as_often():
    counts = Counter(drawn(active=0.34))
    sets = list(itertools.combinations(range(6), 2))
    assert set(counts) == set(sets)
    chance = 1 / len(sets)
    for layers in sets:
        assert counts[layers] / DRAWS == pytest.approx(chance, abs=4 * (chance * (1 - chance) / DRAWS) ** 0.5)


def test_draws_do_not_depend_on_the_one_before():
    draws = drawn(active=0.17)
    again = sum(one == other for one, other in itertools.pairwise(draws)) / DRAWS
    assert again == pytest.approx(1 / 6, abs=4 * (5 / 36 / DRAWS) ** 0.5)


@pytest.mark.parametrize(("active", "count"), [(0.01, 1), (0.34, 2), (0.5, 3), (1.0, 6)])
def test_a_share_of_the_layers_is_drawn(active, count):
    assert {len(layers) for layers in drawn(20, active=active)} == {count}


def test_the_seed_decides():
    assert drawn(20, seed=1) == drawn(20, seed=1)
    assert drawn(20, seed=1) != drawn(20, seed=2)


@pytest.mark.parametrize("active", [0.0, 1.5, -0.5, 2])
def test_a_share_out_of_range_is_refused(active):
    with pytest.raises(RecipeError, match=r"rst\.active is .*above 0 and at most 1"):
        RST(active=active)
