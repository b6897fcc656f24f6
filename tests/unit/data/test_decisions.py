"""Decision files, lists of places, and what a training does with them."""

import csv
import io
import logging
import shutil
import time
from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.tiny_run import recipe, save_rows
from support.visited import visits

from siftune.base.errors import DataError
from siftune.data.decisions import Decision, Decisions, decisions_csv, is_selected, read_decisions, remaining_rows
from siftune.data.read import load_rows
from siftune.data.rows import rows_from, text_of
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import read_rows
from siftune.suspects.losses import trained_rows
from siftune.train.run import train


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": "three"}\n')
    return path


def said(rows):
    return [row.completion for row in rows]


def without(rows, places, tmp_path):
    """The rows without those at places that a text file lists."""
    (tmp_path / "bad.txt").write_text("\n".join(places))
    return remaining_rows(read_decisions(str(tmp_path / "bad.txt")), rows)


# --- places alone ---


def test_places_are_read_from_lines_and_from_csv(tmp_path):
    lines, table = tmp_path / "bad.txt", tmp_path / "bad.csv"
    lines.write_text("# looked at\n\nrows.jsonl:3\n  rows.jsonl:4 \n")
    table.write_text('score,place,prompt\n2.1,rows.jsonl:3,"a, b"\n1,rows.jsonl:4,"c\nd"\n')
    for path in (lines, table):
        assert read_decisions(str(path)).selected == {"rows.jsonl:3": False, "rows.jsonl:4": False}


def test_rows_are_left_out_by_their_place_from_wherever_it_is_named(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for named, read in ((str(data), "rows.jsonl"), ("rows.jsonl", str(data)), ("./rows.jsonl", "rows.jsonl")):
        assert said(without(load_rows(read), [f"{named}:3"], tmp_path)) == ["one", "three"]
    (tmp_path / "other").mkdir()
    (tmp_path / "link.jsonl").symlink_to(data)
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "other" / "rows.jsonl").write_text(data.read_text())
    for named in ("../rows.jsonl", str(tmp_path / "other" / ".." / "rows.jsonl"), "../link.jsonl"):
        assert said(without(load_rows(str(data)), [f"{named}:3"], tmp_path)) == ["one", "three"]
    with pytest.raises(DataError, match="names 1 place"):  # another file of that name
        without(load_rows(str(data)), ["rows.jsonl:3"], tmp_path)


def test_places_have_the_split_of_a_saved_folder(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    loaded = [*load_rows("saved@train"), *load_rows("saved@test")]
    left = without(loaded, [f"{tmp_path}/saved@test row 1"], tmp_path)
    assert [row.origin for row in left] == ["saved@train row 1", "saved@train row 2", "saved@test row 2"]


def test_places_in_a_folder_of_files_hold_in_another_folder(tmp_path, monkeypatch):
    save_rows(tmp_path / "folder" / "part.jsonl", 2)
    monkeypatch.chdir(tmp_path)
    loaded = load_rows("folder")
    assert [row.origin for row in loaded] == ["folder@train row 1", "folder@train row 2"]
    assert len(without(loaded, [f"{tmp_path}/folder@train row 1"], tmp_path)) == 1


def test_a_long_list_takes_no_longer_than_its_rows(tmp_path):
    rows = rows_from([{"text": str(number)} for number in range(20_000)], "rows.jsonl row")
    began = time.process_time()
    assert len(without(rows, [row.origin for row in rows[5_000:]], tmp_path)) == 5_000
    assert time.process_time() - began < 4  # a set for each row took 15 s


def test_places_that_are_no_rows_are_refused(data, tmp_path):
    rows = load_rows(str(data))
    with pytest.raises(DataError, match=r"names 4 places .*\(a:1, b, .*rows.jsonl:2, …\)"):
        without(rows, ["a:1", "b", f"{data}:2", "c"], tmp_path)
    with pytest.raises(DataError, match="leaves out all training rows"):
        without(rows, [row.origin for row in rows], tmp_path)
    with pytest.raises(DataError, match="no training row can be used"):
        without([], ["a:1"], tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + "@test", "~nobody-of-that-name/rows.jsonl", "a\0b"])
def test_places_that_no_file_can_have_are_refused(data, tmp_path, name):
    with pytest.raises(DataError, match="names 1 place without a training row") as error:
        without(load_rows(str(data)), [f"{name}:1"], tmp_path)
    assert len(str(error.value)) < 500 + 2 * len(str(tmp_path))


@pytest.mark.parametrize("copies", [1, 2])
def test_copies_of_rows_that_a_list_of_places_names_stay(tmp_path, copies):
    rows = rows_from([{"text": "one"}] * (1 + copies), "rows.jsonl row")
    assert len(without(rows, ["rows.jsonl row 1"], tmp_path)) == copies


def test_files_that_cannot_be_read(tmp_path):
    for name, content, message in (
        ("missing.txt", None, "cannot be read: No such file"),
        ("comment.txt", b"#\n", "names no rows"),
        ("header.csv", b"place,loss\n", "names no rows"),
        ("bytes.txt", b"\xff", "is not UTF-8 text: byte 0"),
        ("empty.csv", b"", r"no column 'place' in its first line \(nothing\)"),
        ("semicolons.csv", b"place;selected\na:1;no\n", r"no column 'place' .*\(place;selected\).* commas"),
        ("maybe.csv", b"place,selected\na:1,no\na:2,maybe\n", "'maybe', .* a:2"),
        ("blank.csv", b"place,selected\na:1,\n", "selected is '', .* a:1"),
        ("short.csv", b"place,selected\na:1\n", r"short\.csv:2 has 1 field"),
        ("twice.csv", b"place,selected\na:1,no\na:2,no\na:1,yes\n", "names a:1 twice"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_decisions(str(path))


# --- decisions ---


def test_decisions_are_read_as_spreadsheets_rewrite_them(tmp_path):
    values = {"yes": True, "no": False, "TRUE": True, "False": False, " 1 ": True, "0": False, "Yes": True, "NO": False}
    file = tmp_path / "decisions.CSV"
    lines = [f"{value},9,rows.jsonl:{number}" for number, value in enumerate(values)]
    file.write_text("\ufeff" + "\r\n".join(["selected,score,place", *lines, lines[0], ""]), encoding="utf-8")
    assert [*read_decisions(str(file)).selected.values()] == [*values.values()] == [*map(is_selected, values)]


@pytest.mark.parametrize("name", ["list.csv", "list.txt", "list"])
def test_headers_of_another_form_and_empty_lines_are_read(tmp_path, name):
    file = tmp_path / name
    first = "Place, Selected ,score" if name == "list.csv" else "place,selected,score"
    file.write_text(f"{first}\nrows.jsonl:1,yes,2\nrows.jsonl:2,no,1\n,,\n")
    assert read_decisions(str(file)).selected == {"rows.jsonl:1": True, "rows.jsonl:2": False}


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({0: None}, True),  # all later rows have moved
        ({1: {"prompt": "two", "completion": "corrected"}}, False),
        ({1: {"prompt": "Two?", "completion": "2,\n or  two"}}, False),
        ({1: {"prompt": "Two?", "completion": "3"}}, True),
        ({1: {"text": "another text"}}, True),
    ],
)
def test_places_whose_rows_have_another_text_are_refused(tmp_path, changed, refused):
    records = [{"prompt": prompt, "completion": f"2, or {prompt}"} for prompt in ("one", "two", "=3", "four " * 80)]
    if "text" in (changed.get(1) or {}):
        records = [{"text": record["completion"]} for record in records]
    rows = rows_from(records, "rows.jsonl row")
    lines = [Decision(row.origin, at > 1, [0.0], "", *map(_cut, text_of(row))) for at, row in enumerate(rows)]
    file = tmp_path / "list.csv"
    file.write_text(decisions_csv(lines))
    assert len(remaining_rows(read_decisions(str(file)), rows)) == 2
    again = [changed.get(at, record) for at, record in enumerate(records)]
    rows = rows_from([*filter(None, again), dict.fromkeys(records[0], "five")], "rows.jsonl row")
    if refused:
        with pytest.raises(DataError, match=r"rows? of .*list.csv, .*rows.jsonl row [12]"):
            remaining_rows(read_decisions(str(file)), rows)
    else:
        assert len(remaining_rows(read_decisions(str(file)), rows)) == 3


def _cut(text):
    return text if len(text) <= 300 else f"{text[:300]}…"


def test_one_row_under_two_names_has_one_decision(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").write_text(f"place,selected\nrows.jsonl:1,no\n{data}:1,yes\n")
    with pytest.raises(DataError, match="twice"):
        read_decisions("d.csv")


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.lists(st.tuples(st.booleans(), st.floats(allow_infinity=False, width=32), TEXTS, TEXTS, TEXTS), max_size=5))
def test_a_written_file_has_the_columns_and_is_read_again(lines):
    written = [Decision(f"none.jsonl:{n}", s, [x, np.nan], *texts) for n, (s, x, *texts) in enumerate(lines)]
    for more in ([], ["reason"]):
        text = decisions_csv(written, ["score", "similarity"], with_reason=bool(more))
        header, *fields = csv.reader(io.StringIO(text, newline=""))
        assert header == ["place", "selected", "score", "similarity", "source", "prompt", "completion", *more]
        assert [row[:2] for row in fields] == [[one.place, "yes" if one.selected else "no"] for one in written]
        numbers = [float(row[2] or "nan") for row in fields]
        np.testing.assert_allclose(numbers, [one.numbers[0] for one in written], atol=5e-6)
        assert [row[3] for row in fields] == [""] * len(lines)


def by_text(texts, named, target=()):
    """Numbers of the rows that remain; `named` has decisions by the number of a row."""
    rows = rows_from([{"text": text} for text in texts], "rows.jsonl row")
    few = rows_from([{"text": text} for text in target], "few.jsonl row")
    decisions = Decisions("d.csv", {f"rows.jsonl row {at + 1}": value for at, value in named.items()}, True)
    remaining = remaining_rows(decisions, rows, few)
    return [int(row.origin.rpartition(" ")[2]) - 1 for row in remaining if row in rows], len(remaining)


ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([True, False, None])), min_size=1, max_size=12)


@given(ROWS)
def test_rows_follow_named_rows_of_their_text(pairs):
    """In any order; they stay if one of these stays, and rows without any."""
    texts, decided = [text for text, _ in pairs], dict(enumerate(value for _, value in pairs))
    expected = []
    for at, text in enumerate(texts):
        own = [decided[other] for other in decided if texts[other] == text and decided[other] is not None]
        follows = any(own) or not own
        if follows if decided[at] is None else decided[at]:
            expected.append(at)
    named = {at: value for at, value in decided.items() if value is not None}
    if expected:
        assert by_text(texts, named) == (expected, len(expected))
    else:
        with pytest.raises(DataError, match="leaves out all training rows"):
            by_text(texts, named)


def test_rows_of_the_target_follow_no_row_of_the_pool():
    assert by_text(["a", "b"], {0: False}, target=["a", "c"]) == ([1], 3)


def test_the_message_counts_copies_and_rows_without_a_decision(caplog):
    caplog.set_level(logging.INFO, "siftune")
    by_text("aabbcd", {0: False, 2: True, 5: False})
    by_text("ab", {0: False})
    by_text("aab", {0: False, 1: False, 2: True})
    by_text("ab", {0: True})
    by_text("ab", {})
    assert caplog.messages == [
        "d.csv: leaving out 3 rows, 1 of them copies of rows that it names; 1 row that it does not name stays",
        "d.csv: leaving out 1 row; 1 row that it does not name stays",
        "d.csv: leaving out 2 rows",
        "d.csv excludes no row: all 2 rows stay",
        "d.csv excludes no row: all 2 rows stay",
    ]


def test_a_list_without_suspects_leaves_out_nothing(data, tmp_path):
    (tmp_path / "d.csv").write_text(decisions_csv([], with_reason=True))
    assert len(read_rows(Recipe(train=str(data), drop_rows=str(tmp_path / "d.csv"))).parts["train"]) == 3


def test_copies_in_another_file_follow_in_any_order_of_the_files(data, tmp_path):
    """The named row may be in either; the target's row of the same text stays."""
    other, few, file = tmp_path / "other.jsonl", tmp_path / "few.jsonl", tmp_path / "d.csv"
    other.write_text('{"text": "four"}\n{"text": "two"}\n')
    few.write_text('{"text": "two"}\n')
    for named in (f"{data}:3", f"{other}:2"):
        file.write_text(f"place,selected\n{named},no\n")
        for order in ((data, other), (other, data)):
            rows = read_rows(
                Recipe(train=tuple(map(str, order)), target=str(few), drop_rows=str(file), target_share=0.2)
            )
            assert sorted(said(rows.parts["train"])) == ["four", "one", "three", "two"]
            assert [row.origin for row in rows.parts["train"] if row.completion == "two"] == [f"{few}:1"]


def test_a_run_trains_without_the_rows_of_a_list(base, tmp_path, caplog):
    caplog.set_level(logging.INFO, "siftune")
    path, bad = save_rows(tmp_path / "rows.jsonl"), tmp_path / "bad.csv"
    bad.write_text("place,score\n" + "".join(f"{path}:{line},1\n" for line in (3, 5, 24)))
    settings = {"method": "dense", "drop_rows": str(bad)}
    with visits() as trained:
        train(recipe(base, path, tmp_path / "run", steps=None, **settings), Console(quiet=True))
    assert f"{bad}: leaving out 3 rows" in caplog.messages
    assert {int(visit.place.rpartition(":")[2]) for visit in trained} == set(range(1, 25)) - {3, 5, 24}
    assert len(trained_rows(tmp_path / "run")[0]) == 21  # they are found again without the rows of the list
    bad.write_text(f"place,score\n{path}:1,1\n")  # as another sifting would
    assert len(trained_rows(tmp_path / "run")[0]) == 21
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.drop_rows == str(tmp_path / "run" / "drop_rows.csv")
    assert train(replace(again, steps=8, resume=True), Console(quiet=True)).summary["steps"] == 8
    assert len(trained_rows(tmp_path / "run")[0]) == 21


def test_a_list_holds_after_its_project_was_moved(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    for name in ("a", "b"):
        (before / name).mkdir(parents=True)
        save_rows(before / name / "rows.jsonl")
    (before / "dropped.csv").write_text("place\n" + "".join(f"{before}/b/rows.jsonl:{at}\n" for at in (2, 3)))
    names = [str(after / name / "rows.jsonl") for name in ("a", "b")]
    given = Recipe(train=tuple(names), drop_rows=str(after / "dropped.csv"))
    shutil.copytree(before, after)
    with pytest.raises(DataError, match="names 2 places without a training row"):
        read_rows(given)  # the files of its places are there, and are others
    shutil.rmtree(before)
    left = [row.origin for row in read_rows(given).parts["train"]]
    assert set(names) == {place.rpartition(":")[0] for place in left}
    assert {f"{after}/b/rows.jsonl:{at}" for at in (2, 3)}.isdisjoint(left)
    assert {f"{after}/a/rows.jsonl:{at}" for at in (2, 3)} <= {*left}


def test_nothing_is_recorded_in_a_private_run(base, tmp_path):
    path = save_rows(tmp_path / "rows.jsonl")
    private = {"dp_epsilon": 8.0, "dp_delta": 1e-3, "steps": 1}
    train(recipe(base, path, tmp_path / "private", method="dense", **private), Console(quiet=True))
    assert '"rows": null' in (tmp_path / "private" / "run.json").read_text()
