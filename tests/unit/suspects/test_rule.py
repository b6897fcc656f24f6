"""Suspects among rows whose correct and wrong losses have other forms than the rule could assume."""

import numpy as np
import pytest

from siftune.suspects.rule import Scores, judge

KINDS = {
    "learned": lambda rng, count: rng.exponential(0.5, count),
    "half of it not learned": lambda rng, count: np.where(
        rng.random(count) < 0.5, rng.exponential(0.3, count), rng.normal(4.3, 0.5, count)
    ),
    "long answers": lambda rng, count: rng.normal(20.0, 1.0, count),
}
WRONG = {"learned": (7.0, 1.5), "half of it not learned": (7.0, 1.2), "long answers": (28.0, 3.0)}


def pool(task, share, seed, count=2000):
    rng = np.random.default_rng(seed)
    wrong = rng.random(count) < share
    losses = np.where(wrong, rng.normal(*WRONG[task], count), KINDS[task](rng, count))
    return losses, wrong, rng.normal(*WRONG[task], 200)


def scores(losses, kinds=None, gains=None):
    return Scores(losses, np.zeros(len(losses), int) if kinds is None else kinds, gains)


def one_kind(losses, decoys):
    return judge(scores(losses), scores(decoys))


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_four_of_five_suspects_are_wrong(task, share, seed):
    losses, wrong, decoys = pool(task, share, seed)
    verdict = one_kind(losses, decoys)
    chosen = verdict.order[: verdict.count]
    assert wrong[chosen].sum() >= 0.7 * wrong.sum()
    assert wrong[chosen].mean() >= 0.7


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_of_correct_rows_none_is_suspect(task, seed):
    losses, _, decoys = pool(task, 0.0, seed)
    assert one_kind(losses, decoys).count == 0


def test_an_unlearned_task_tells_nothing():
    """Rows and decoys have the same losses, and no prompt helps."""
    rng = np.random.default_rng(0)
    rows, decoys = (scores(rng.normal(3, 1, n), gains=rng.normal(0, 1, n)) for n in (400, 200))
    assert judge(rows, decoys).count == 0


def test_wrong_rows_that_are_not_like_decoys_are_not_counted_too_high():
    losses, wrong, decoys = pool("learned", 0.15, 0)
    losses[wrong] -= 3.0  # near misses
    verdict = one_kind(losses, decoys)
    assert verdict.count < wrong.sum()
    assert wrong[verdict.order[: verdict.count]].mean() >= 0.8 or not verdict.count


def test_rows_are_compared_with_decoys_of_their_kind():
    easy, _, decoys = pool("learned", 0.15, 0)
    hard, _, hard_decoys = pool("long answers", 0.0, 0)
    kinds, of_decoys = np.repeat([3, 5], len(easy)), np.repeat([3, 5], len(decoys))
    rows = scores(np.concatenate([easy, hard]), kinds)
    verdict = judge(rows, scores(np.concatenate([decoys, hard_decoys]), of_decoys))
    alone = one_kind(easy, decoys)
    assert verdict.order[: verdict.count].tolist() == alone.order[: alone.count].tolist()
    assert verdict.above[0] == (decoys < easy[0]).mean()


@pytest.mark.parametrize("decoys", [0, 20])
def test_too_few_decoys_do_not_tell(decoys):
    losses, _, _ = pool("learned", 0.3, 0)
    verdict = one_kind(losses, np.full(decoys, 7.0))
    assert (verdict.count, sorted(verdict.order)) == (0, [*range(len(losses))])


def test_equal_losses():
    assert one_kind(np.ones(100), np.ones(50)).count in (0, 100)
    assert one_kind(np.zeros(0), np.ones(50)).count == 0


@pytest.mark.parametrize("seed", range(3))
def test_rare_answers_that_gain_from_their_prompts_are_no_suspects(seed):
    """A fifth of a source has losses like decoys: suspects, unless their prompts lower these losses."""
    rng = np.random.default_rng(seed)
    losses, _, decoys = pool("long answers", 0.2, seed)
    none, some = scores(decoys, gains=rng.normal(0, 1, 200)), np.where(rng.random(2000) < 0.9, np.nan, 1.0)
    correct = scores(losses, gains=some * rng.normal(10, 2, 2000))
    assert judge(correct, none).count == 0
    gains = np.where(losses >= 24.0, rng.normal(0, 1, 2000), rng.normal(10, 2, 2000))
    both = judge(scores(losses, gains=some * gains), none)
    assert both.count == one_kind(losses, decoys).count > 200


@pytest.mark.parametrize(("without", "count"), [(8, 0), (12, 20), (50, 20)])
def test_gains_must_allow_half_of_the_share_by_losses(without, count):
    losses, gains = np.repeat([0.1, 8.0], [80, 20]), np.repeat([9.0, 0.0], [100 - without, without])
    assert judge(scores(losses, gains=gains), scores(np.full(50, 8.0), gains=np.zeros(50))).count == count
