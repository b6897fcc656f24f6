import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.evaluate.bootstrap import Bootstrap
from siftune.offsite.audits.membership import RowLosses, auc, auc_interval, infer_membership

FEW = Bootstrap(resamples=400, seed=2)
# few distinct values, so that there are ties
some = st.lists(st.sampled_from([-2.5, -1.0, 0.0, 0.1, 3.0]) | st.floats(-9, 9), min_size=1, max_size=12)


def by_pairs(members, others):
    """The definition: every member against every other."""
    wins = sum(1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others)
    return wins / (len(members) * len(others))


@given(some, some)
def test_auc_is_the_share_of_pairs_that_are_told_apart(members, others):
    assert auc(members, others) == pytest.approx(by_pairs(members, others), abs=1e-12)
    assert auc(others, members) == pytest.approx(1 - auc(members, others), abs=1e-12)


def test_the_ends_of_the_scale():
    assert auc([2, 3], [0, 1]) == 1
    assert auc([0, 1], [2, 3]) == 0
    assert auc([1, 1], [1, 1, 1]) == 0.5


def test_the_interval_resamples_each_side_among_itself():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 30).round(1), rng.normal(0, 1, 50).round(1)
    found = auc_interval(members, others, Bootstrap(4000))
    slow = [by_pairs(rng.choice(members, 30), rng.choice(others, 50)) for _ in range(1000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.02)
    assert found.low < found.value < found.high
    assert found.value == by_pairs(members, others)


@given(some, some)
def test_the_interval_holds_the_range_and_repeats(members, others):
    found = auc_interval(members, others, FEW)
    assert 0 <= found.low <= found.high <= 1
    assert auc_interval(members, others, FEW) == found
    if len(set(members)) == len(set(others)) == 1:
        assert found.low == found.high == found.value


def test_what_the_two_attacks_look_at():
    # members lost a nat each by training; one of them is hard for any model
    members = RowLosses(np.array([3.0, 9.0]), np.array([2.0, 8.0]))
    others = RowLosses(np.array([3.0, 4.0, 5.0]), np.array([3.0, 4.1, 5.0]))
    found = infer_membership(members, others, left_out=4, bootstrap=FEW)
    assert found.loss.value == 0.5  # 2 is below all others, 8 above
    assert found.reference.value == 1
    assert (found.members, found.others, found.left_out) == (2, 3, 4)
    assert found.reference.low == found.reference.high == 1


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0]), ([[1.0]], [1.0])])
def test_refusals(members, others):
    with pytest.raises(ValueError, match="at least one member"):
        auc(members, others)
