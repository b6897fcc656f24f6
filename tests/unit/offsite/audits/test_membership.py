from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.evaluate.bootstrap import Bootstrap
from siftune.offsite.audits.membership import RowLosses, _by_score, infer_membership, measure_attack, tpr

FEW = Bootstrap(resamples=400, seed=2)
# few distinct values, so that there are ties
some = st.lists(st.sampled_from([-2.5, -1.0, 0.0, 0.1, 3.0]) | st.floats(-9, 9), min_size=1, max_size=12)


def auc(members, others):
    return measure_attack(members, others, Bootstrap(1)).auc.value


def share_found(members, others, rate):
    return tpr(*(side[None].astype(float) for side in _by_score(members, others)), rate)[0]


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


def found_by_trying(members, others, rate):
    """The definition: every threshold between and beside the scores; those with few enough false alarms count."""
    tries = sorted({*members, *others})
    cuts = [-np.inf, *((a + b) / 2 for a, b in pairwise(tries)), np.inf]
    shares = [(np.mean([o > cut for o in others]), np.mean([m > cut for m in members])) for cut in cuts]
    return max(found for alarms, found in shares if alarms <= rate + 1e-9)


@given(some, some, st.sampled_from([0.01, 0.05, 0.25, 0.5, 1.0]))
def test_members_found_at_a_share_of_false_alarms(members, others, rate):
    assert share_found(members, others, rate) == pytest.approx(found_by_trying(members, others, rate), abs=1e-12)


def test_figures_of_an_attack_and_their_intervals():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.8, 1, 60).round(1), rng.normal(0, 1, 120).round(1)
    found = measure_attack(members, others, Bootstrap(4000))
    slow = []
    for _ in range(800):
        m, o = rng.choice(members, 60), rng.choice(others, 120)
        slow.append([by_pairs(m, o), *(float((m > np.sort(o)[::-1][k]).mean()) for k in (1, 6))])
    for one, column in zip((found.auc, found.tpr_1, found.tpr_5), np.array(slow).T, strict=True):
        assert (one.low, one.high) == pytest.approx(tuple(np.quantile(column, [0.025, 0.975])), abs=0.04)
        assert one.low <= one.value <= one.high
    assert found.auc.value == pytest.approx(by_pairs(members, others))
    # of 120 others one may be above at 1 %, six at 5 %
    assert found.tpr_1.value == (members > np.sort(others)[::-1][1]).mean()
    assert found.tpr_5.value == (members > np.sort(others)[::-1][6]).mean()
    assert (found.members, found.others) == (60, 120)


def test_too_few_others_do_not_resolve_a_rate():
    for count, resolved in ((19, (False, False)), (20, (False, True)), (99, (False, True)), (100, (True, True))):
        found = measure_attack([0.0], np.arange(count), FEW)
        assert (found.resolves(0.01), found.resolves(0.05)) == resolved


def test_an_interval_beside_one_half_tells_apart_on_either_side():
    low, high = list(range(30)), list(range(20, 50))
    assert measure_attack(high, low, FEW).tells_apart
    assert measure_attack(low, high, FEW).tells_apart
    assert not measure_attack(low, low, FEW).tells_apart


@given(some, some)
def test_the_interval_holds_the_range_and_repeats(members, others):
    found = measure_attack(members, others, FEW)
    assert measure_attack(members, others, FEW) == found
    for one in (found.auc, found.tpr_1, found.tpr_5):
        assert 0 <= one.low <= one.high <= 1
    if len(set(members)) == len(set(others)) == 1:
        assert found.auc.low == found.auc.high == found.auc.value


def test_what_the_attacks_look_at():
    # members lost a nat each by training; one of them is hard for any model
    members = RowLosses(np.array([3.0, 9.0]), np.array([2.0, 8.0]))
    others = RowLosses(np.array([3.0, 4.0, 5.0]), np.array([3.0, 4.1, 5.0]))
    found = infer_membership(members, others, left_out=4, bootstrap=FEW)
    assert found.loss.auc.value == 0.5  # 2 is below all others, 8 above
    assert found.reference.auc.value == 1
    assert found.blind.auc.value == 2.5 / 6  # 3 beats 4 and 5 and equals 3; 9 beats none
    assert (found.members, found.others, found.left_out) == (2, 3, 4)
    assert found.reference.auc.low == found.reference.auc.high == 1
    assert found.online is None


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0]), ([[1.0]], [1.0])])
def test_refusals(members, others):
    with pytest.raises(ValueError, match="at least one member"):
        auc(members, others)
