"""Axes."""

import pytest

from siftune.report.charts import room
from siftune.report.words import tick_texts, ticks


@pytest.mark.parametrize(
    ("bounds", "texts"),
    [
        ((1, 960), ["200", "400", "600", "800"]),
        ((0, 7.5e-4), ["0", "2e-4", "4e-4", "6e-4"]),
        ((1.02e-3, 1.08e-3), ["1.02e-3", "1.04e-3", "1.06e-3", "1.08e-3"]),
        ((0.9999, 1.0001), ["0.9999", "1.0000", "1.0001"]),
    ],
)
def test_ticks_are_round_and_differ(bounds, texts):
    assert tick_texts(ticks(*bounds)) == texts


def test_a_small_difference_does_not_fill_an_axis():
    low, high = room([100.0, 101.0])
    assert high - low == pytest.approx(10, rel=0.02)
    low, high = room([0.50, 0.51], percent=True)
    assert high - low == pytest.approx(0.1)
    assert room([1.0, 2.0]) == pytest.approx((0.94, 2.06))
    assert room([0.0, 0.0], zero=True) == (0.0, 1.0)
    assert room([0.01, 0.02], percent=True) == pytest.approx((0.0, 0.1))
