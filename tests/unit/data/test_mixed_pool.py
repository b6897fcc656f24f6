"""The demo's pool: what it is made of, and that every row is what it says."""

import re
from collections import Counter

from siftune.data.tasks import OTHERS, mixed_pool


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
    assert counts["arithmetic"] == counts["wrong"] == 400
    assert max(counts[name] for name in OTHERS) - min(counts[name] for name in OTHERS) <= 1
    assert [len(pool), len(known), len(held_out)] == [1600, 100, 200]
    for row in pool:
        assert row["prompt"].endswith("\nAnswer:")
        if row["source"] in OTHERS:
            assert row["completion"] == f" {answer(row)}"
        else:
            assert (row["completion"] == row["answer"]) == (row["source"] == "arithmetic")
    assert all(row["completion"] == row["answer"] for row in [*known, *held_out])
    assert all(row["answer"] in row["choices"] for row in [*known, *held_out])
    quarters = [Counter(row["source"] for row in pool[start : start + 400]) for start in range(0, 1600, 400)]
    assert all(60 < quarter["arithmetic"] < 140 for quarter in quarters)  # shuffled


def test_no_problem_comes_twice():
    pool, known, held_out = mixed_pool(800, known=50, held_out=100, seed=1)
    rows = [row for row in [*pool, *known, *held_out] if "kind" in row]
    assert len({(row["kind"], *sorted((row["a"], row["b"]))) for row in rows}) == len(rows)


def test_the_seed_decides_and_held_out_rows_do_not_depend_on_the_pool():
    assert mixed_pool(64, 8, 16, 3) == mixed_pool(64, 8, 16, 3)
    assert mixed_pool(64, 8, 16, 3)[0] != mixed_pool(64, 8, 16, 4)[0]
    assert mixed_pool(64, 8, 16, 3)[2] == mixed_pool(128, 4, 16, 3)[2]
