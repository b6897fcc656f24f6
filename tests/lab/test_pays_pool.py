"""Rows of pays' jobs: of what a pool is made, that no row is in two places, and what methods are trained on."""

import json
from collections import Counter

import pytest

from lab.pays import pool as pools
from lab.pays.cells import SCENARIOS, cells_of
from lab.pays.pool import make_pool
from lab.pays.training_rows import training_rows
from siftune.base.errors import DataError, RecipeError

FILES = ("ARC-Easy", "ARC-Challenge", "openbookqa")


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A folder of made-up questions in the suite's format; few rows are held out."""
    for name, value in {"QUESTIONS": 12, "DEV_QUESTIONS": 6, "OTHER_QUESTIONS": 4}.items():
        monkeypatch.setattr(pools, name, value)
    for part, count in (("train", 60), ("test", 20)):
        for file in FILES:
            rows = [choice(f"{file} {part} {number}?", number) for number in range(count)]
            rows.append(choice(f"{file} " + "long " * 50, 0))
            rows.append(choice("in both parts?", 0))
            (tmp_path / f"{file}.{part}.json").write_text(json.dumps(rows))
        rows = [boolean(f"boolq {part} {number}?") for number in range(count)]
        (tmp_path / f"boolq.{part}.json").write_text(json.dumps(rows))
    return tmp_path


def choice(question, number):
    options = " ".join(f"Answer{i + 1}: option {number} {i}" for i in range(3))
    text = (
        f"Please choose the correct answer to the question: {question}\n\n{options}\n\nAnswer format: answer1/answer2"
    )
    return {"instruction": text, "answer": f"answer{number % 3 + 1}"}


def boolean(question):
    text = f"Please answer the following question with true or false, question: {question}\n\nAnswer format: true/false"
    return {"instruction": text, "answer": "true"}


def words(row):
    return len(row["prompt"].split()) + len(row["completion"].split())


def draw(suite, name="mix", scenario="S1", known=8, seed=0, **changes):
    cell = {**cells_of(scenario, [name], known)[0], **changes}
    return make_pool({"cell": cell, "seed": seed, "steps": 5, "batch": 8}, suite, words)


def identity(row):
    return row.get("text") or row["prompt"], row.get("a"), row.get("b")


@pytest.mark.parametrize("name", ["mix", "reverse", "arc-25-wrong", "boolq-10", "arithmetic-50"])
def test_shares_and_rows_that_are_nowhere_twice(suite, name):
    pool = draw(suite, name)
    cell = cells_of("S1", [name])[0]
    counts = Counter(row["group"] for row in pool.train)
    assert (counts["target"], counts["wrong"]) == (cell["share"] * 40, cell["wrong"] * 40)
    rest = [counts[other] for other in cell["rest"]]
    assert sum(counts.values()) == 40
    assert max(rest) - min(rest) <= 1
    every = [*pool.train, *pool.known, *pool.test, *pool.dev, *(row for rows in pool.other.values() for row in rows)]
    assert len({identity(row) for row in every}) == len(every) == 40 + 8 + 12 + 6 + 4 * len(pool.other)
    held_out = {row["prompt"] for row in [*pool.test, *pool.dev]}
    assert not held_out & {row["prompt"] for row in [*pool.train, *pool.known] if "a" not in row}


def test_only_wrong_rows_are_wrong(suite):
    for name in ("mix", "reverse"):
        pool = draw(suite, name)
        for row in [*pool.train, *pool.known, *pool.test, *pool.dev]:
            assert (row["completion"] != row["answer"]) == row["wrong"] == (row["group"] == "wrong")
    options = [row for row in draw(suite, "reverse").train if row["group"] == "wrong"]
    assert all(row["completion"] in row["choices"] for row in options)


def test_wrong_numbers_are_even_or_near(suite):
    def far(name):
        rows = [row for row in draw(suite, name, "S2", rows=400).train if row["group"] == "wrong"]
        assert len(rows) == 180
        return sum(row["completion"] not in row["choices"] for row in rows)

    assert far("near-45") == 0
    assert far("uniform-45") > 160


def test_the_pool_is_the_same_with_any_number_of_known_rows(suite):
    few, many = draw(suite, known=4), draw(suite, known=30)
    assert (few.train, few.test, few.dev) == (many.train, many.test, many.dev)
    assert few.known == many.known[:4]


def test_rows_differ_by_seed(suite):
    one, same, other = draw(suite), draw(suite), draw(suite, seed=1)
    assert one == same
    assert [row["prompt"] for row in one.test] != [row["prompt"] for row in other.test]
    assert [row["prompt"] for row in one.train] != [row["prompt"] for row in other.train]


def test_long_rows_and_questions_of_both_parts_are_left_out(suite):
    pool = draw(suite, "reverse", rows=160, share=0.9, wrong=0.0)
    prompts = [row["prompt"] for row in pool.train if row["group"] == "target"]
    assert len(prompts) == 144
    assert not [prompt for prompt in prompts if "long" in prompt or "both" in prompt]


def test_too_small_a_task_is_refused(suite):
    with pytest.raises(DataError, match="options has 180 train rows left, too few for 200"):
        draw(suite, "reverse", rows=800)


def test_every_cell_is_whole():
    for scenario in SCENARIOS:
        make, known = SCENARIOS[scenario]
        cells = make(known)
        assert len({cell["name"] for cell in cells}) == len(cells)
        for cell in cells:
            assert cell["share"] + cell["wrong"] <= 1
            assert bool(cell["rest"]) == (cell["share"] + cell["wrong"] < 1)
            assert not {cell["target"], *cell["rest"]} & set(cell["others"])
    with pytest.raises(ValueError, match="S1 has no cell 'mixed'; use mix"):
        cells_of("S1", ["mixed"])
    with pytest.raises(ValueError, match="no scenario 'S9'"):
        cells_of("S9", [])


POOL = [{"group": name, "number": i} for i, name in enumerate(["target", "other", "wrong"] * 8)]
KNOWN = [{"group": "known", "number": i} for i in range(3)]


def groups(plan, **others):
    return Counter(row["group"] for row in training_rows(plan, POOL, KNOWN, 30, **others))


def test_plans_by_hand():
    assert groups("pool") == {"target": 8, "other": 8, "wrong": 8}
    assert groups("pool+known") == {"target": 8, "other": 8, "wrong": 8, "known": 3}
    assert groups("pool+weighted") == {"target": 8, "other": 8, "wrong": 8, "known": 8}
    assert groups("known") == {"known": 30}
    assert groups("retrieved+weighted", retrieve=lambda: POOL[:6]) == {"target": 2, "other": 2, "wrong": 2, "known": 2}
    times = Counter(row["number"] for row in training_rows("known", POOL, KNOWN, 31))
    assert sorted(times.values()) == [10, 10, 11]


def test_a_cap_holds_where_few_rows_are_known():
    one, many = KNOWN[:1], POOL * 10
    assert len(training_rows("pool+weighted", many, one, 30)) == 240 + 80
    assert len(training_rows("pool+capped", many, one, 30)) == 240 + 30


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(RecipeError, match="unknown rows 'pools'"):
        training_rows("pools", POOL, KNOWN, 8)
    with pytest.raises(RecipeError, match=r"unknown rows 'pool\+more'"):
        training_rows("pool+more", POOL, KNOWN, 8)
    for plan in ("known", "retrieved", "pool+weighted"):
        with pytest.raises(RecipeError, match="the cell has none"):
            training_rows(plan, POOL, [], 8)
