"""Which rows are held out, and how often others come: by what they say, and by nothing else."""

from collections import Counter
from dataclasses import replace

from siftune.data import target as split
from siftune.data.rows import rows_from
from siftune.data.target import held_out


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


def test_what_differs_in_anything_that_is_learned_has_a_place_of_its_own():
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    others = [{"prompt": [{"role": role, "content": "a"}], "completion": "b"} for role in ("user", "system")]
    longer = {"messages": [*turns, {"role": "assistant", "content": "b"}]}
    unlearned = {"prompt": turns, "completion": "b"}
    found = [rows_from([record])[0] for record in (talk, *others, longer, unlearned)]
    places = split._places(found, "x")
    assert places[0] == places[1]
    assert len(set(places)) == 4


def test_what_is_trained_on_anyway_is_not_held_out():
    _, held = held_out(rows(range(200)), 0.3)
    known = rows([text.split()[-1] for text in texts(held)[:5]] + ["other"])
    kept, left = held_out(rows(range(200)), 0.3, known)
    assert texts(left) == texts(held)[5:]
    assert sorted(texts([*kept, *left])) == sorted(texts(rows(range(200))))
