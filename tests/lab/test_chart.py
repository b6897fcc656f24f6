"""The chart of docs/which_method.md is what the recorded runs give."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pip install siftune[lab]")
from lab.chart import HERE, draw, points

pytestmark = pytest.mark.lab
COMMITTED = Path(__file__).parents[2] / "docs" / "images" / "chart.svg"


def test_the_chart_is_that_of_the_records(tmp_path):
    drawn = points(HERE / "results")
    assert [point.name for point in drawn] == [
        "the few rows alone", "--target", "--target --method gast", "gast", "ist",
    ]  # fmt: skip
    assert (drawn[0].points, drawn[0].low, drawn[0].high) == pytest.approx((34.67, 28.67, 40.67), abs=0.01)
    assert (drawn[1].points, drawn[1].low, drawn[1].high) == pytest.approx((22.73, 16.13, 28.93), abs=0.01)
    draw(drawn, tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert "currentColor" in text
    assert "prefers-color-scheme" in text
    for point in drawn:
        assert point.name in text
        assert point.name in COMMITTED.read_text(encoding="utf-8")
