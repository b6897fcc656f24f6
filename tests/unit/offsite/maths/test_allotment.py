"""Shares of a budget against trying all choices, in float64."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.base.errors import RecipeError
from siftune.offsite.maths.allotment import hull, water_fill

numbers = st.floats(0, 100, allow_nan=False)


@st.composite
def tables(draw, convex):
    """Up to four matrices of up to five sizes; convex: equal steps, each of which saves no more than the one before."""
    sizes, costs = [], []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        if convex:
            savings = sorted(draw(st.lists(numbers, min_size=count - 1, max_size=count - 1)))
            sizes.append([float(1 + place) for place in range(count)])
            costs.append([sum(savings[: count - 1 - place]) for place in range(count)])
        else:
            sizes.append(sorted(draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))))
            costs.append(draw(st.lists(numbers, min_size=count, max_size=count)))
    least, most = (sum(one[end] for one in sizes) for end in (0, -1))
    return sizes, costs, draw(st.integers(int(least), int(most)))


def best(sizes, costs, budget):
    """The least cost of all choices within a budget."""
    choices = itertools.product(*(range(len(one)) for one in sizes))
    return min(total(costs, places) for places in choices if total(sizes, places) <= budget)


def total(table, places):
    return sum(row[place] for row, place in zip(table, places, strict=True))


def lowest(costs):
    return [[min(row[: place + 1]) for place in range(len(row))] for row in costs]


@given(tables(convex=True))
def test_on_convex_costs_it_is_the_best_choice(case):
    sizes, costs, budget = case
    places = water_fill(sizes, costs, budget)
    assert total(sizes, places) == budget
    assert total(costs, places) == pytest.approx(best(sizes, costs, budget), abs=1e-9)


@given(tables(convex=False))
def test_on_others_it_is_within_one_step_of_a_matrix(case):
    """No choice saves more than the hulls do at this level, and less than one step of one of them was left undone."""
    sizes, costs, budget = case
    places = water_fill(sizes, costs, budget)
    assert total(sizes, places) <= budget
    down = lowest(costs)
    steps = [
        one[2] - other[2] for pair in zip(sizes, costs, strict=True) for one, other in itertools.pairwise(hull(*pair))
    ]
    assert total(down, places) <= best(sizes, down, budget) + max(steps, default=0.0) + 1e-9


@given(tables(convex=False))
def test_a_hull_lies_below_all_points_and_its_steps_save_less_and_less(case):
    sizes, costs, _ = case
    for own, row in zip(sizes, lowest(costs), strict=True):
        found = hull(own, row)
        assert (found[0][0], found[-1][0]) == (0, len(own) - 1)
        for size, cost in zip(own, row, strict=True):
            for (_, n0, c0), (_, n1, c1) in itertools.pairwise(found):
                if n0 < n1 and n0 <= size <= n1:
                    assert cost >= c0 + (c1 - c0) * (size - n0) / (n1 - n0) - 1e-9


def test_where_nothing_is_lost_all_get_the_same():
    sizes = [[10, 20, 30, 40], [100, 200, 300, 400], [10, 20, 30, 40]]
    shares = [own[place] / own[-1] for own, place in zip(sizes, water_fill(sizes, [[0.0] * 4] * 3, 360), strict=True)]
    assert shares == [0.75, 0.75, 0.75]


def test_a_good_step_behind_a_poor_one_is_taken():
    """Whole matrices cost nothing, while two factors of nearly their size do."""
    assert water_fill([[1, 5, 9, 10], [1, 5, 9, 10]], [[10, 9, 8, 0], [9, 8.5, 8, 7.9]], 13) == [3, 0]


def test_a_budget_below_the_smallest_sizes_is_refused():
    with pytest.raises(RecipeError, match=r"5 parameters .* no fewer than 6"):
        water_fill([[2, 3], [4, 5]], [[1, 0], [1, 0]], 5)
