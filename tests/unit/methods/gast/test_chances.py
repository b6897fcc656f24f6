"""Chances among recent rows and draws by a running sum, against plain Python and exact counts."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.recent import chance_by_bisection, last_by_bisection, top_chance_by_orders

from siftune.methods.gast import maths
from siftune.methods.gast.settings import GASTSettings

scores = st.lists(st.integers(-40, 40), min_size=1, max_size=12).map(lambda numbers: [n / 7 for n in numbers])
shares = st.floats(0.02, 0.98)


def chances(company, recent, share, **settings):
    settings = GASTSettings(select=share, among="recent", **settings)
    return maths.chances(*(torch.tensor(s, dtype=torch.float64) for s in (company, recent)), settings)


@given(company=scores, recent=scores, share=shares)
def test_stochastic_chances_are_those_of_a_bisection(company, recent, share):
    wanted = [chance_by_bisection(score, recent, share) for score in company]
    got = chances(company, recent, share)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-8, atol=1e-11)


def last_of(rows, share):
    logits = torch.tensor([rows], dtype=torch.float64)
    return (maths.log_factor(logits, share) + logits[:, -1]).clamp_max(0).exp()


@given(rows=scores, share=shares, spread=st.sampled_from([0.02, 0.3, 1.0, 2.0, 20.0]))
def test_the_factor_is_that_of_a_bisection_however_far_apart_the_logits_are(rows, share, spread):
    logits = [row * spread for row in rows]
    wanted = torch.tensor([last_by_bisection(logits, share)], dtype=torch.float64)
    torch.testing.assert_close(last_of(logits, share), wanted, rtol=1e-8, atol=1e-11)


@given(company=scores, recent=scores.filter(lambda s: len(s) < 6), share=shares)
def test_top_chances_are_those_over_all_orders_of_equal_rows(company, recent, share):
    wanted = [top_chance_by_orders(score, recent, share) for score in company]
    got = chances(company, recent, share, choice="topk")
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@given(rows=scores.filter(lambda s: len(s) > 1), share=shares)
@pytest.mark.parametrize("choice", ["stochastic", "topk", "random"])
def test_the_share_is_exact_for_rows_that_are_alike(choice, rows, share):
    """Of any rows, let each be the one that is new: the chances have the mean that was asked for, however few."""
    news = [chances([score], rows[:i] + rows[i + 1 :], share, choice=choice) for i, score in enumerate(rows)]
    assert float(torch.cat(news).mean()) == pytest.approx(share, rel=1e-9)


@given(recent=st.permutations(range(9)), score=st.sampled_from([-0.5, 3.5, 4.5, 8.5]), share=shares)
def test_logits_far_apart_take_the_top_and_logits_that_are_close_draw_evenly(recent, score, share):
    top = chances([score], recent, share, choice="topk")
    far, close = (last_of([row * spread for row in [*recent, score]], share) for spread in (1e6, 1e-9))
    torch.testing.assert_close(far, top, rtol=0, atol=1e-6)
    torch.testing.assert_close(close, torch.full_like(close, share), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20])
def test_the_size_of_scores_does_not_matter(scale):
    generator = torch.Generator().manual_seed(0)
    recent = torch.randn(20, generator=generator, dtype=torch.float64)
    for choice in ("stochastic", "topk"):
        wanted = chances([0.3, 2.0], recent.tolist(), 0.4, choice=choice)
        got = chances([0.3 * scale, 2.0 * scale], (recent * scale).tolist(), 0.4, choice=choice)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)


def test_equal_scores_draw_evenly():
    for choice in ("stochastic", "topk", "random"):
        assert chances([2.0, 2.0], [2.0] * 20, 0.3, choice=choice).tolist() == pytest.approx([0.3] * 2, rel=1e-12)


def test_a_score_that_is_not_finite_has_no_chance_to_be_told():
    recent = [1.0, 2.0, 3.0]
    assert chances([math.nan, 2.0], recent, 0.5).isnan().tolist() == [True, False]


# --- draws


def drawn(chances_S, begun):
    return maths.systematic(torch.tensor(chances_S, dtype=torch.float64), torch.tensor(begun))


parts = st.lists(st.integers(0, 1024), min_size=1, max_size=8)


@given(numbers=parts)
def test_each_row_is_drawn_with_its_chance_exactly(numbers):
    """Over an even grid of beginnings, and chances on that grid, there is no error at all."""
    counts = torch.zeros(len(numbers), dtype=torch.int64)
    for start in range(1024):
        followed, _ = drawn([n / 1024 for n in numbers], start * (maths.TURN // 1024))
        counts += followed
    assert counts.tolist() == numbers


@given(numbers=parts, begun=st.integers(0, 1023))
def test_it_is_the_loop_over_rows(numbers, begun):
    total, wanted = Fraction(begun, 1024), []
    for number in numbers:
        after = total + Fraction(number, 1024)
        wanted.append(math.floor(after) > math.floor(total))
        total = after
    followed, rest = drawn([n / 1024 for n in numbers], begun * (maths.TURN // 1024))
    assert followed.tolist() == wanted
    assert Fraction(int(rest), maths.TURN) == total - math.floor(total)
    assert int(followed.sum()) == math.floor(total)


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=12), begun=st.integers(0, maths.TURN - 1))
def test_the_division_into_batches_does_not_matter(values, begun):
    """Not even by rounding."""
    whole, rest = drawn(values, begun)
    for cut in range(1, len(values)):
        first, between = drawn(values[:cut], begun)
        second, after = drawn(values[cut:], int(between))
        assert torch.equal(torch.cat([first, second]), whole)
        assert torch.equal(after, rest)


@given(begun=st.integers(0, maths.TURN - 1))
def test_certain_rows_are_drawn_and_impossible_ones_are_not(begun):
    pattern = [1.0, 0.0, 1 / 3, 1.0, 0.0, 1.0]
    followed, _ = drawn(pattern, begun)
    assert [followed[i].item() for i in (0, 1, 3, 4, 5)] == [True, False, True, False, True]


def test_joint_draws_of_two_rows():
    """Systematic draws are not independent: two rows of chance one half follow each other in turn."""
    pairs = {tuple(drawn([0.5, 0.5], start * (maths.TURN // 8))[0].tolist()) for start in range(8)}
    assert pairs == set(itertools.permutations([True, False]))
