"""Seeded tasks: every answer is true, problems differ, and the pool has its shares."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from siftune.base.errors import DataError
from siftune.cli.demo_rows import KINDS, OTHERS, arithmetic_rows, mixed_pool


def solve(prompt: str) -> int:
    """Answer a question from its words alone."""
    x, y = map(int, re.findall(r"\d+", prompt))
    words = prompt.lower()
    if re.search(r"larger|maximum", words):
        return max(x, y)
    if re.search(r"smaller|minimum", words):
        return min(x, y)
    if re.search(r"\+|add|sum", words):
        return x + y
    assert re.search(r"-|subtract|difference", words)
    return y - x if "subtract" in words else abs(x - y)


def problem(row):
    return row["kind"], frozenset((row["a"], row["b"]))


def test_every_answer_is_true_and_among_four_different_choices():
    rows = arithmetic_rows(2000, seed=3)
    for row in rows:
        assert row["answer"] == row["completion"] == str(solve(row["prompt"]))
        assert not row["wrong"]
        assert {int(n) for n in re.findall(r"\d+", row["prompt"])} == {row["a"], row["b"]}
        assert 10 <= min(row["a"], row["b"]) < max(row["a"], row["b"]) <= 99
        assert len(set(row["choices"])) == len(row["choices"]) == 4
        assert row["answer"] in row["choices"]
    places = Counter(row["choices"].index(row["answer"]) for row in rows)
    assert min(places.values()) > 400  # the right choice stands in every place about equally often


def test_each_kind_has_several_wordings_and_both_orders():
    rows = arithmetic_rows(800, seed=0)
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        assert len({re.sub(r"\d+", "N", row["prompt"]) for row in own}) == 3
        assert 0.3 < sum(row["a"] < row["b"] for row in own) / len(own) < 0.7


@pytest.mark.parametrize("n", [0, 1, 4, 203])
def test_kinds_are_balanced_and_problems_differ(n):
    rows = arithmetic_rows(n, seed=1)
    counts = Counter(row["kind"] for row in rows)
    assert len(rows) == n == len({problem(row) for row in rows})
    assert max(counts.values(), default=0) - min((counts[kind] for kind in KINDS), default=0) <= 1


def test_excluded_problems_do_not_come_again_even_when_the_pool_is_nearly_used_up():
    test = arithmetic_rows(3_900, seed=2)
    train = arithmetic_rows(12_000, seed=3, exclude=test)
    assert not {problem(row) for row in train} & {problem(row) for row in test}


def test_too_many_rows_are_refused():
    with pytest.raises(DataError, match=r"5000 .*'sum'.*4005.*16020"):
        arithmetic_rows(20_000, seed=0)


def answer(row):
    """Solve a row of another task from its words alone."""
    numbers = re.findall(r"\d+", row["prompt"])
    if row["source"] == "reverse":
        return "".join(reversed(numbers[0]))
    if row["source"] == "sort":
        return ", ".join(sorted(numbers, key=int))
    last = int(numbers[-1])
    return f"{last + 1}, {last + 2}, {last + 3}"


def test_a_quarter_is_right_a_quarter_wrong_and_the_rest_are_other_tasks():
    pool, known, held_out = mixed_pool(1600, known=100, held_out=200, seed=0)
    counts = Counter(row["source"] for row in pool)
    assert counts["arithmetic"] == 2 * sum(row.get("wrong", False) for row in pool) == 800
    assert max(counts[name] for name in OTHERS) - min(counts[name] for name in OTHERS) <= 1
    assert [len(pool), len(known), len(held_out)] == [1600, 100, 200]
    for row in pool:
        assert row["prompt"].endswith("\nAnswer:")
        if row["source"] in OTHERS:
            assert row["completion"] == f" {answer(row)}"
        else:
            assert (row["completion"] == row["answer"]) == (not row["wrong"])
    assert all(row["completion"] == row["answer"] for row in [*known, *held_out])
    assert all(row["answer"] in row["choices"] for row in [*known, *held_out])
    quarters = [Counter(row["source"] for row in pool[start : start + 400]) for start in range(0, 1600, 400)]
    assert all(140 < quarter["arithmetic"] < 260 for quarter in quarters)  # shuffled


def test_no_problem_comes_twice():
    pool, known, held_out = mixed_pool(800, known=50, held_out=100, seed=1)
    rows = [row for row in [*pool, *known, *held_out] if "kind" in row]
    assert len({(row["kind"], *sorted((row["a"], row["b"]))) for row in rows}) == len(rows)


def test_the_seed_decides_and_held_out_rows_do_not_depend_on_the_pool():
    assert mixed_pool(64, 8, 16, 3) == mixed_pool(64, 8, 16, 3)
    assert mixed_pool(64, 8, 16, 3)[0] != mixed_pool(64, 8, 16, 4)[0]
    assert mixed_pool(64, 8, 16, 3)[2] == mixed_pool(128, 4, 16, 3)[2]
