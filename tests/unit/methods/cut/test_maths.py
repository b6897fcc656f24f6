"""Cuts in exact fractions, and the frequencies of draws."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from siftune.methods.cut import draw_depth, lowest_layer

shares = st.tuples(st.integers(1, 40), st.integers(0, 39)).map(lambda pair: Fraction(pair[1] % pair[0], pair[0]))


@given(depth=shares, layers=st.integers(1, 80))
@example(depth=Fraction(13, 23), layers=23)  # whose product of floats is 12.999…
def test_the_cut_is_the_floor_of_the_exact_product(depth, layers):
    assert lowest_layer(float(depth), layers) == depth.numerator * layers // depth.denominator


def test_one_layer_trains_however_deep_the_cut():
    assert [lowest_layer(1 - 1e-15, layers) for layers in (1, 4, 30)] == [0, 3, 29]


def test_a_share_given_twice_is_drawn_twice_as_often():
    generator, draws = torch.Generator().manual_seed(0), 8000
    counts = Counter(draw_depth((0.25, 0.25, 0.5, 0.75), generator) for _ in range(draws))
    assert set(counts) == {0.25, 0.5, 0.75}
    for depth, chance in ((0.25, 1 / 2), (0.5, 1 / 4), (0.75, 1 / 4)):
        assert counts[depth] / draws == pytest.approx(chance, abs=4 * (chance * (1 - chance) / draws) ** 0.5)
