"""Files that name rows, and what is done with these."""

import logging
import time

import datasets
import pytest
from rich.console import Console
from support.tiny_run import recipe, save_rows

from siftune.base.errors import DataError
from siftune.data.read import load_rows
from siftune.data.rows import rows_from
from siftune.records.rows import named_rows, without
from siftune.records.visits import read_visits
from siftune.suspects.losses import trained_rows
from siftune.train.run import train


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": "three"}\n')
    return path


def said(rows):
    return [row.completion for row in rows]


def test_places_are_read_from_lines_and_from_csv(tmp_path):
    lines, table = tmp_path / "bad.txt", tmp_path / "bad.csv"
    lines.write_text("# looked at\n\nrows.jsonl:3\n  rows.jsonl:4 \n")
    table.write_text('score,place,prompt\n2.1,rows.jsonl:3,"a, b"\n1,rows.jsonl:4,"c\nd"\n')
    assert named_rows(str(lines)) == named_rows(str(table)) == ["rows.jsonl:3", "rows.jsonl:4"]


def test_rows_are_left_out_by_their_place_from_wherever_it_is_named(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for named, read in ((str(data), "rows.jsonl"), ("rows.jsonl", str(data)), ("./rows.jsonl", "rows.jsonl")):
        assert said(without(load_rows(read), [f"{named}:3"], "bad.txt")) == ["one", "three"]
    (tmp_path / "other").mkdir()
    (tmp_path / "link.jsonl").symlink_to(data)
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "other" / "rows.jsonl").write_text(data.read_text())
    for named in ("../rows.jsonl", str(tmp_path / "other" / ".." / "rows.jsonl"), "../link.jsonl"):
        assert said(without(load_rows(str(data)), [f"{named}:3"], "bad.txt")) == ["one", "three"]
    with pytest.raises(DataError, match="names 1 place"):  # another file of that name
        without(load_rows(str(data)), ["rows.jsonl:3"], "bad.txt")


def test_places_have_the_split_of_a_saved_folder(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    loaded = [*load_rows("saved@train"), *load_rows("saved@test")]
    left = without(loaded, [f"{tmp_path}/saved@test row 1"], "bad.txt")
    assert [row.origin for row in left] == ["saved@train row 1", "saved@train row 2", "saved@test row 2"]


def test_places_in_a_folder_of_files_hold_in_another_folder(tmp_path, monkeypatch):
    save_rows(tmp_path / "folder" / "part.jsonl", 2)
    monkeypatch.chdir(tmp_path)
    loaded = load_rows("folder")
    assert [row.origin for row in loaded] == ["folder@train row 1", "folder@train row 2"]
    assert len(without(loaded, [f"{tmp_path}/folder@train row 1"], "bad.txt")) == 1


def test_a_long_list_takes_no_longer_than_its_rows():
    rows = rows_from([{"text": str(number)} for number in range(20_000)], "rows.jsonl")
    began = time.process_time()
    assert len(without(rows, [row.origin for row in rows[5_000:]], "bad.txt")) == 5_000
    assert time.process_time() - began < 4  # a set for each row took 15 s


def test_places_that_are_no_rows_are_refused(data):
    rows = load_rows(str(data))
    with pytest.raises(DataError, match=r"names 4 places .*\(a:1, b, .*rows.jsonl:2, …\)"):
        without(rows, ["a:1", "b", f"{data}:2", "c"], "bad.txt")
    with pytest.raises(DataError, match="names all training rows"):
        without(rows, [row.origin for row in rows], "bad.txt")


def test_an_empty_table_is_told_to_be_empty(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="no column 'place'"):
        named_rows(str(tmp_path / "empty.csv"))


def test_files_that_cannot_be_read(tmp_path):
    for name, content, message in (
        ("missing.txt", None, "cannot be read: No such file"),
        ("comment.txt", b"#\n", "names no rows"),
        ("header.csv", b"place,loss\n", "names no rows"),
        ("bytes.txt", b"\xff", "is not UTF-8 text: byte 0"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            named_rows(str(path))


def test_a_run_trains_without_the_rows_of_a_list(base, tmp_path, caplog):
    caplog.set_level(logging.INFO, "siftune")
    path, bad = save_rows(tmp_path / "rows.jsonl"), tmp_path / "bad.csv"
    bad.write_text("place,score\n" + "".join(f"{path}:{line},1\n" for line in (3, 5, 24)))
    settings = {"method": "dense", "drop_rows": str(bad)}
    train(recipe(base, path, tmp_path / "run", steps=None, **settings), Console(quiet=True))
    assert f"{bad}: leaving out 3 rows" in caplog.messages
    found = read_visits(tmp_path / "run" / "rows.parquet")
    assert {int(place.rpartition(":")[2]) for place in found.places} == set(range(1, 25)) - {3, 5, 24}
    assert len(trained_rows(tmp_path / "run")[0]) == 21  # they are found again without the rows of the list


def test_nothing_is_recorded_in_a_private_run(base, tmp_path):
    path = save_rows(tmp_path / "rows.jsonl")
    private = {"dp_epsilon": 8.0, "dp_delta": 1e-3, "steps": 1}
    train(recipe(base, path, tmp_path / "private", method="dense", **private), Console(quiet=True))
    assert not list(tmp_path.rglob("rows.parquet"))
