"""Plans of a middle: sizes and shares."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.emulators import FAMILIES, base, calibration, settings

from siftune.base.errors import RecipeError
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.plan import allot, keep_for_size
from siftune.offsite.emulator.split import Split


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0.05, 1.0))
def test_shares_average_to_what_is_kept_and_stay_in_range(scores, keep):
    shares = allot(scores, keep)
    assert sum(shares) / len(shares) == pytest.approx(keep, rel=1e-6)
    assert all(0.5 * keep * (1 - 1e-9) <= share <= 1 for share in shares)


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=20), st.floats(0.1, 0.9))
def test_a_higher_score_never_gets_less(scores, keep):
    shares = allot(scores, keep)
    pairs = sorted(zip(scores, shares, strict=True))
    assert all(a[1] <= b[1] + 1e-9 for a, b in pairwise(pairs))


def test_shares_are_in_proportion_to_the_roots_where_no_limit_holds():
    shares = allot([1.0, 1.21, 0.81], 0.6)
    assert shares == pytest.approx([0.6, 0.66, 0.54])


@pytest.mark.parametrize("scores", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_scores_that_say_nothing_give_equal_shares(scores):
    assert allot(scores, 0.5) == [0.5, 0.5]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_is_met(family):
    model = base(family)
    whole, half = (keep_size(model, keep) for keep in (1.0, 0.5))
    target = (whole + half) / 2
    keep = keep_for_size(model, Split(1, 1), target, 8)
    assert half < keep_size(model, keep) <= target * 1.02


def keep_size(model, keep):
    (parts,) = emulators(model, calibration(model), [settings(keep=keep)])
    return sum(t.numel() * t.element_size() for t in parts.frozen.values())


def test_a_size_out_of_range_names_the_range():
    with pytest.raises(RecipeError, match="give a size between"):
        keep_for_size(base(), Split(1, 1), 10, 8)
    with pytest.raises(RecipeError, match="give a size between"):
        keep_for_size(base(), Split(1, 1), 1e9, 8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep_attn": 0.0}, r"keep_attn is 0\.0"),
        ({"keep_mlp": 1.5}, r"keep_mlp is 1\.5"),
        ({"keep_attn": 1.0, "keep_mlp": 1.0}, "both 1"),
        ({"keep_mlp": 0.5, "method": "layerdrop"}, "keep_mlp says what stays"),
        ({"keep_attn": 0.5, "allot": "score"}, "keep_attn says what stays"),
        ({"keep_attn": 0.5, "keep": 1.0}, "a keep of 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(values, words):
    with pytest.raises(RecipeError, match=words):
        settings(**values).check()
    settings(keep_attn=1.0, keep_mlp=0.5).check()
