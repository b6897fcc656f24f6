"""Shadow models: scores against scipy-free densities row by row, and what the design of the halves promises."""

import math
from statistics import NormalDist, fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.evaluate.bootstrap import Bootstrap
from siftune.offsite.audits.lira import confidence, halves, lira
from siftune.offsite.audits.membership import measure_attack


def auc(members, others):
    return measure_attack(members, others, Bootstrap(1)).auc.value


@given(st.integers(2, 9), st.integers(2, 12), st.integers(0, 99))
def test_every_pair_of_models_shares_out_the_rows(count, rows, seed):
    drawn = halves(count, rows, seed)
    assert drawn.shape == (count, rows)
    for first in range(0, count - 1, 2):
        assert (drawn[first] ^ drawn[first + 1]).all()
        assert drawn[first].sum() == rows // 2
    assert drawn.any(axis=0).all()
    assert not drawn.all(axis=0).any()


def test_halves_differ_between_pairs_and_seeds():
    drawn = halves(6, 40, 0)
    assert len({tuple(line) for line in drawn}) == 6
    assert (halves(6, 40, 0) == drawn).all()
    assert (halves(6, 40, 1) != drawn).any()


@given(st.floats(1e-6, 30))
def test_confidence_is_the_logit_of_the_probability(nll):
    p = math.exp(-nll)
    assert confidence(np.array([nll]))[0] == pytest.approx(math.log(p / (1 - p)), rel=1e-6, abs=1e-9)


def test_confidence_of_what_is_certain_is_finite():
    assert np.isfinite(confidence(np.array([0.0, 1e-300, 800.0]))).all()


@given(st.integers(0, 99))
def test_scores_are_log_densities(seed):
    rng = np.random.default_rng(seed)
    shadows, trained, target = rng.normal(size=(8, 5)), halves(8, 5, seed), rng.normal(size=5)
    found = lira(target, shadows, trained)
    sides = {}
    for inside in (True, False):
        lists = [[shadows[n, r] for n in range(8) if trained[n, r] == inside] for r in range(5)]
        means = [fmean(one) for one in lists]
        squares = sum((value - mean) ** 2 for one, mean in zip(lists, means, strict=True) for value in one)
        sides[inside] = means, math.sqrt(squares / sum(len(one) - 1 for one in lists))
    for row in range(5):
        densities = {inside: NormalDist(means[row], sigma).pdf(target[row]) for inside, (means, sigma) in sides.items()}
        assert found[row] == pytest.approx(math.log(densities[True] / densities[False]), rel=1e-6, abs=1e-6)


def test_rows_of_their_own_ease_are_told_apart_where_one_threshold_fails():
    """Every row has an ease of its own, far above what training adds."""
    rng = np.random.default_rng(0)
    ease, gain = rng.normal(0, 5, 200), 1.0
    trained = halves(16, 200, 3)
    shadows = ease + gain * trained + rng.normal(0, 0.4, (16, 200))
    members = np.arange(200) < 100
    target = ease + gain * members + rng.normal(0, 0.4, 200)
    found = lira(target, shadows, trained)
    assert auc(target[members], target[~members]) < 0.65
    assert auc(found[members], found[~members]) > 0.95


def test_a_target_that_saw_no_row_tells_nothing():
    rng = np.random.default_rng(1)
    ease, trained = rng.normal(0, 5, 400), halves(8, 400, 3)
    shadows = ease + trained + rng.normal(0, 0.4, (8, 400))
    found = lira(ease + rng.normal(0, 0.4, 400), shadows, trained)
    assert 0.42 < auc(found[:200], found[200:]) < 0.58


def test_two_shadows_leave_no_deviation_and_still_a_score():
    found = lira(np.array([0.9, 0.1]), np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[True, False], [False, True]]))
    assert found[0] > 0 > found[1]


def test_a_row_without_one_kind_of_shadow_is_refused():
    with pytest.raises(ValueError, match="one that was not"):
        lira(np.zeros(2), np.zeros((2, 2)), np.array([[True, False], [True, True]]))
