"""Shares of rows: a target's among others, and held-out rows, which depend on their text alone."""

import doctest
from collections import Counter
from dataclasses import replace

import pytest

from siftune.cli import demo_rows
from siftune.data import batches, target
from siftune.data.rows import rows_from
from siftune.data.target import held_out, source_or_file, sources, with_target


def made(count, **more):
    return rows_from([{"prompt": f"{more} {n}", "completion": "x", **more} for n in range(count)])


@pytest.mark.parametrize(
    ("others", "target", "share", "expected"),
    [
        (6, 1, 0.25, 2), (75, 5, 0.25, 25), (90, 10, 0.1, 10), (10, 40, 0.25, 40), (3000, 2, 0.5, 14), (10, 3, 0.0, 0),
    ],
)  # fmt: skip
def test_a_target_makes_up_its_share_but_none_of_it_is_left_out_or_comes_too_often(others, target, share, expected):
    rows = with_target(made(others), made(target, kind="few"), share)
    assert len(rows) == others + expected
    added = rows[others:]
    times = [sum(row.prompt == one.prompt for row in added) for one in made(target, kind="few")]
    assert not expected or max(times) - min(times) <= 1
    assert sources(rows) == ["other"] * others + ["target"] * expected


def test_sources_of_rows():
    rows = [*made(1, source="web"), *made(1), *made(1, source=7), *made(1, source=""), *made(1, source=None)]
    few = made(1, source="mine")
    assert sources(with_target(rows, few, 0.25)) == ["web", "other", "7", "other", "other", "target", "target"]
    assert source_or_file(rows) == ["web", "row 1", "7", "row 1", "row 1"]


def rows(numbers, name="row"):
    return rows_from([{"prompt": f"What is {i}?", "completion": str(i)} for i in numbers], name)


def texts(part):
    return [row.completion for row in part]


def test_a_row_stays_where_it_is_when_others_are_added_moved_or_shuffled():
    few, many = rows(range(0, 300, 3)), rows(reversed(range(300)), "other file:")
    of_few, of_many = (set(texts(held_out(part, 0.2)[1])) for part in (few, many))
    assert of_few
    assert of_few == of_many & set(texts(few))


def test_every_row_is_in_one_part_and_parts_keep_the_order():
    kept, held = held_out(rows(range(200)), 0.3)
    assert sorted([*texts(kept), *texts(held)], key=int) == texts(rows(range(200)))
    assert all(texts(part) == sorted(texts(part), key=int) for part in (kept, held))


def test_rows_that_say_the_same_are_on_one_side_whatever_else_they_have():
    once = rows(range(100))
    twice = [*once, *(replace(row, origin="elsewhere", extra={"source": "web"}) for row in once)]
    counts = Counter(texts(held_out(twice, 0.4)[1]))
    assert set(counts.values()) == {2}


def test_a_larger_share_holds_out_the_rows_of_a_smaller_one():
    parts = [set(texts(held_out(rows(range(300)), share)[1])) for share in (0, 0.1, 0.5)]
    assert parts[0] == set()
    assert parts[0] < parts[1] < parts[2]


def test_rows_with_different_label_turns_have_different_places():
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    others = [{"prompt": [{"role": role, "content": "a"}], "completion": "b"} for role in ("user", "system")]
    longer = {"messages": [*turns, {"role": "assistant", "content": "b"}]}
    unlearned = {"prompt": turns, "completion": "b"}
    found = [rows_from([record])[0] for record in (talk, *others, longer, unlearned)]
    places = target._places(found)
    assert places[0] == places[1]
    assert len(set(places)) == 4


def test_training_rows_are_not_held_out():
    _, held = held_out(rows(range(200)), 0.3)
    known = rows([text.split()[-1] for text in texts(held)[:5]] + ["other"])
    kept, left = held_out(rows(range(200)), 0.3, known)
    assert texts(left) == texts(held)[5:]
    assert sorted(texts([*kept, *left])) == sorted(texts(rows(range(200))))


@pytest.mark.parametrize("module", [batches, target, demo_rows])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
