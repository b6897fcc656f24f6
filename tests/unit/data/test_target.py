"""Rows of a target among others: how often they come, and where rows say that they are from."""

import pytest

from siftune.data.rows import rows_from
from siftune.data.target import sources, with_target


def made(count, **more):
    return rows_from([{"prompt": f"{more} {n}", "completion": "x", **more} for n in range(count)])


@pytest.mark.parametrize(
    ("others", "target", "share", "expected"),
    [
        (6, 1, 0.25, 2), (75, 5, 0.25, 25), (90, 10, 0.1, 10), (10, 40, 0.25, 40), (3000, 2, 0.5, 60), (10, 3, 0.0, 0),
    ],
)  # fmt: skip
def test_a_target_makes_up_its_share_but_none_of_it_is_left_out_or_comes_too_often(others, target, share, expected):
    rows = with_target(made(others), made(target, kind="few"), share)
    assert len(rows) == others + expected
    added = rows[others:]
    times = [sum(row.prompt == one.prompt for row in added) for one in made(target, kind="few")]
    assert not expected or max(times) - min(times) <= 1
    assert sources(rows) == ["other"] * others + ["target"] * expected


def test_where_rows_are_from():
    rows = [*made(1, source="web"), *made(1), *made(1, source=7)]
    assert sources(with_target(rows, made(1, source="mine"), 0.25)) == ["web", "other", "7", "target"]
