"""Files that name rows, and what is done with these."""

import json
import logging

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.tiny_run import recipe, save_rows

from siftune.base.errors import DataError, UnsupportedError
from siftune.data.readers import load_rows
from siftune.recipe.read import load_recipe
from siftune.records.lists import named_rows, row_weights, weighed, without
from siftune.records.visits import read_visits
from siftune.suspects.named import suspects
from siftune.train.prepare import read_rows
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
    with pytest.raises(DataError, match="names 1 place where no training row stands"):  # another file of that name
        without(load_rows(str(data)), ["rows.jsonl:3"], "bad.txt")


def test_weights_go_to_the_rows_that_are_named(data, tmp_path):
    table = tmp_path / "weights.csv"
    table.write_text(f"place,weight\n{data}:3,0.25\n{data}:4,2\n")
    found = weighed(load_rows(str(data)), row_weights(str(table)), str(table))
    assert [row.extra.get("weight") for row in found] == [None, 0.25, 2.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column 'place' in its first line"),
        ("place\nrows.jsonl:1\n", "has no column 'weight' in its first line (found: place)"),
        ("place,weight\n", "weighs no rows"),
        ("place,weight\na:1,x\n", "weights.csv:2: the weight is 'x'; give a number from 0 on"),
        ("place,weight\na:1,-1\n", "the weight is '-1'"),
        ("place,weight\na:1,inf\n", "the weight is 'inf'"),
        ("place,weight\na:1\n", "the weight is None"),
        ("place,weight\na:1,1\na:1,2\n", "weights.csv:3: a:1 has the weight 2 here and 1 before"),
    ],
)
def test_tables_of_weights_that_are_wrong(tmp_path, text, words):
    path = tmp_path / "weights.csv"
    path.write_text(text)
    with pytest.raises(DataError) as raised:
        row_weights(str(path))
    assert words in str(raised.value)


def test_places_that_are_no_rows_are_refused(data):
    rows = load_rows(str(data))
    with pytest.raises(
        DataError, match=r"bad.txt names 4 places where no training row stands \(a:1, b, .*rows.jsonl:2, …\); the first"
    ):
        without(rows, ["a:1", "b", f"{data}:2", "c"], "bad.txt")
    with pytest.raises(DataError, match="names 1 place where no training row stands"):
        weighed(rows, {f"{data}:9": 1.0}, "w.csv")
    with pytest.raises(DataError, match="names all training rows"):
        without(rows, [row.origin for row in rows], "bad.txt")


def test_an_empty_table_is_told_to_be_empty(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"no column 'place' in its first line \(found: nothing\)"):
        named_rows(str(tmp_path / "empty.csv"))


def test_files_that_cannot_be_read(tmp_path):
    for make, words in (
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.write_text("#\n"), "names no rows"),
        (lambda path: path.write_bytes(b"\xff"), "is not UTF-8 text: byte 0"),
    ):
        path = tmp_path / f"{len(words)}.txt"
        make(path)
        with pytest.raises(DataError, match=words):
            named_rows(str(path))


def test_a_run_trains_without_the_rows_of_a_list(base, tmp_path, caplog):
    caplog.set_level(logging.INFO, "siftune")
    path, bad = save_rows(tmp_path / "rows.jsonl"), tmp_path / "bad.csv"
    bad.write_text("place,score\n" + "".join(f"{path}:{line},1\n" for line in (3, 5, 24)))
    settings = {"method": "dense", "drop_rows": str(bad)}
    train(recipe(base, path, tmp_path / "run", steps=None, **settings), Console(quiet=True))
    assert f"{bad}: 3 rows to leave out" in caplog.messages
    found = read_visits(tmp_path / "run" / "rows.parquet")
    assert {int(place.rpartition(":")[2]) for place in found.places} == set(range(1, 25)) - {3, 5, 24}
    assert len(suspects(tmp_path / "run", 3)) <= 3  # their texts are found again without the rows of the list


def test_nothing_is_recorded_in_a_private_run(base, tmp_path):
    path = save_rows(tmp_path / "rows.jsonl")
    private = {"dp_epsilon": 8.0, "dp_delta": 1e-3, "steps": 1}
    train(recipe(base, path, tmp_path / "private", method="dense", **private), Console(quiet=True))
    assert not list(tmp_path.rglob("rows.parquet"))


def trained(base, rows, out, **settings):
    train(recipe(base, rows, out, method="dense", **settings), Console(quiet=True))
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_weights_of_a_list_are_those_of_the_column_to_the_bit(base, tmp_path):
    path, column, table = save_rows(tmp_path / "rows.jsonl"), tmp_path / "column.jsonl", tmp_path / "weights.csv"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, weight in {2: 0.0, 7: 0.25, 19: 3.0}.items():
        records[number]["weight"] = weight
    column.write_text("".join(json.dumps(record) + "\n" for record in records))
    table.write_text(f"place,weight\n{path}:3,0\n{path}:8,0.25\n{path}:20,3\n")
    by_column, by_list = (
        trained(base, rows, tmp_path / name, accumulate=2, **settings)
        for name, rows, settings in (("column", column, {}), ("list", path, {"row_weights": str(table)}))
    )
    plain = trained(base, path, tmp_path / "plain", accumulate=2)
    assert all(torch.equal(by_column[name], value) for name, value in by_list.items())
    assert any(not torch.equal(plain[name], value) for name, value in by_list.items())
    one, other = (read_visits(tmp_path / name / "rows.parquet").visits for name in ("plain", "list"))
    assert one.loss[one.step == 0].tolist() == other.loss[other.step == 0].tolist()  # losses are told without weights
    again = load_recipe(tmp_path / "list" / "recipe.yaml")
    assert again.row_weights == str(table)


def test_both_lists_go_together(base, tmp_path):
    path, table, gone = save_rows(tmp_path / "rows.jsonl"), tmp_path / "weights.csv", tmp_path / "gone.txt"
    table.write_text(f"place,weight\n{path}:3,0.5\n{path}:4,0.5\n")
    gone.write_text(f"{path}:3\n")
    found = read_rows(recipe(base, path, tmp_path / "run", method="dense", row_weights=str(table), drop_rows=str(gone)))
    assert [row.weight for row in found.parts["train"]] == [1.0, 1.0, 0.5, *[1.0] * 20]


def test_weights_and_privacy_do_not_go_together(base, tmp_path):
    path, table = save_rows(tmp_path / "rows.jsonl"), tmp_path / "weights.csv"
    table.write_text(f"place,weight\n{path}:3,0.5\n")
    with pytest.raises(UnsupportedError, match="leave the column 'weight' and row_weights out"):
        trained(base, path, tmp_path / "run", row_weights=str(table), dp_epsilon=8.0, dp_delta=1e-3, steps=1)
