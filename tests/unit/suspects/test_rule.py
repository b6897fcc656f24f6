"""Suspects among rows whose probabilities, and so their chance of being wrong, are known."""

import numpy as np
import pytest

from siftune.suspects.rule import judge


def pool(seed, wrong, learned=6.0, count=4000, answers=8):
    """Losses of rows of a task by a model that is right about the answers that the rows should have.

    Of each row, the correct answer is drawn from the model's probabilities of 8 answers. A wrong row has another one.
    The decoys of a row are two of the others.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (count, answers)) * learned
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    correct = (p.cumsum(1) < rng.random((count, 1))).sum(1)
    is_wrong = rng.random(count) < wrong
    own = np.where(is_wrong, (correct + rng.integers(1, answers, count)) % answers, correct)
    orders = rng.permuted(np.tile(np.arange(answers), (count, 1)), axis=1)
    others = np.array([order[order != one][:2] for order, one in zip(orders, own, strict=True)])
    losses, row = -np.log(p), np.arange(count)
    likelier = others[row, losses[row[:, None], others].argmin(1)]
    usual = np.full(count, np.log(answers))  # after other prompts
    return is_wrong, judge(losses[row, own], losses[row, likelier], usual, usual, shared=False)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wrong", [0.1, 0.2, 0.4])
def test_four_of_five_suspects_are_wrong_if_the_model_is_right_about_correct_answers(seed, wrong):
    is_wrong, verdict = pool(seed, wrong)
    suspects = verdict.order[: verdict.count]
    assert is_wrong[suspects].mean() > 0.8
    assert is_wrong[suspects].sum() > 0.2 * is_wrong.sum()  # of seven other answers, two are tried


@pytest.mark.parametrize("seed", range(3))
def test_of_correct_rows_none_is_suspect(seed):
    _, verdict = pool(seed, wrong=0.0)
    assert verdict.count == 0
    assert "10 times as well" in verdict.doubt


def test_a_model_that_has_learned_nothing_does_not_tell():
    rng = np.random.default_rng(0)
    loss, *decoys = rng.normal(20, 5, (3, 1000))
    usual = np.full(1000, 20.0)
    verdict = judge(loss, np.minimum(*decoys), usual, usual, shared=False)
    assert (verdict.count, "learned too little" in verdict.doubt) == (0, True)


def losses(suspects, usual=9.0, other_usual=9.0, count=100):
    """Losses of rows of which the first have an answer that is less likely than another one."""
    loss = np.repeat([6.0, 0.1], [suspects, count - suspects])
    return judge(loss, np.full(count, 2.0), np.full(count, usual), np.full(count, other_usual), shared=False)


def test_the_own_prompt_must_favour_the_other_answer_ten_times():
    """The other answer is short, and as likely after any prompt; the row's own is likely after its prompt only."""
    assert losses(20).count == 20  # (9 − 2) − (9 − 6) nats
    assert losses(20, usual=10.6).count == 20
    assert losses(20, usual=10.8).count == 0
    assert losses(20, other_usual=7.4).count == 20
    assert losses(20, other_usual=7.2).count == 0
    assert losses(20, other_usual=np.nan).count == 0


@pytest.mark.parametrize(
    ("other", "shared", "count"), [(3.6, False, 20), (3.8, False, 0), (4.6, True, 20), (4.8, True, 0)]
)
def test_without_shared_answers_the_other_one_must_also_be_ten_times_as_likely(other, shared, count):
    loss, others = np.repeat([6.0, 0.1], [20, 80]), np.full(100, other)
    assert judge(loss, others, np.full(100, 9.0), np.full(100, 10.0), shared).count == count


@pytest.mark.parametrize(("suspects", "count"), [(2, 0), (3, 3), (50, 50), (51, 0)])
def test_few_or_most_rows_are_no_suspects(suspects, count):
    verdict = losses(suspects)
    assert (verdict.count, bool(verdict.doubt)) == (count, count == 0)
    assert verdict.order[:suspects].tolist() == [*range(suspects)]


@pytest.mark.parametrize(("typical", "shared", "count"), [(999, False, 20), (1001, False, 0), (1001, True, 20)])
def test_rows_with_answers_of_their_own_with_tiny_probabilities_do_not_tell(typical, shared, count):
    loss = np.repeat([12.0, np.log(typical)], [20, 80])
    verdict = judge(loss, np.full(100, 8.0), np.full(100, 20.0), np.full(100, 20.0), shared)
    assert (verdict.count, "below 1 in 1,000" in verdict.doubt) == (count, count == 0)


def test_the_limit_is_ten_times():
    loss, other, usual = np.repeat([2 + np.log(9.9), 2 + np.log(10.1), 0.0], [20, 20, 60]), *np.full((2, 100), 2.0)
    verdict = judge(loss, other, usual, usual, shared=False)
    assert sorted(verdict.order[: verdict.count]) == [*range(20, 40)]


@pytest.mark.parametrize("missing", [100, 80])
def test_rows_without_a_decoy_come_last_and_too_few_others_do_not_tell(missing):
    other = np.where(np.arange(100) < missing, np.nan, 2.0)
    verdict = judge(np.full(100, 6.0), other, np.full(100, 6.0), np.full(100, 9.0), shared=False)
    assert (verdict.count, "30 are needed" in verdict.doubt) == (0, True)
    assert {*verdict.order[100 - missing :]} == {*range(missing)}
