"""Training rows of a run folder, from the files that its recipe names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from rich.console import Console
from support.tiny_run import recipe, save_rows

from siftune.base.errors import DataError, InputError
from siftune.recipe.training_rows import digest_of, recipe_of_rows, refuse_changed, used_rows
from siftune.train.run import train

QUIET = Console(quiet=True)


def rows_of(run):
    return used_rows(run, recipe_of_rows(run))["train"]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run on eight rows."""
    place = tmp_path_factory.mktemp("trained")
    train(recipe(base, save_rows(place / "rows.jsonl", 8), place / "run", method="dense", steps=1), QUIET)
    return place


@pytest.fixture
def changed(trained, tmp_path):
    """Returns a function that copies the run, and replaces a part of its recipe."""
    shutil.copytree(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"

    def change(before, after):
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
        return tmp_path / "run"

    return change


def test_files_are_logged(trained, caplog):
    caplog.set_level("INFO", "siftune")
    assert [row.completion for row in rows_of(trained / "run")] == [str(i + i * i) for i in range(8)]
    assert f"{trained / 'rows.jsonl'}: 8 rows" in caplog.messages


@pytest.mark.parametrize("key", ["train", "target", "drop_rows"])
def test_a_missing_file_is_refused_by_its_name_and_the_recipe(changed, trained, key):
    before = f"train: {trained / 'rows.jsonl'}" if key == "train" else f"{key}: null"
    run = changed(before, f"{key}: /elsewhere/rows.jsonl")
    with pytest.raises(DataError, match=f"/elsewhere/rows.jsonl.*{run / 'recipe.yaml'}"):
        rows_of(run)


@pytest.mark.parametrize("name", ["/dev/zero", "/etc/hostname"])
def test_a_file_that_is_no_file_of_rows_is_not_read(changed, trained, name):
    with pytest.raises(DataError, match=name):
        rows_of(changed(f"train: {trained / 'rows.jsonl'}", f"train: {name}"))


def test_held_out_rows_and_texts_to_keep_are_not_read(changed):
    run = changed("eval: null", "eval: /elsewhere/rows.jsonl")
    assert len(rows_of(changed("keep: null", "keep: /elsewhere/rows.jsonl"))) == len(rows_of(run)) == 8


def test_rows_that_have_changed_are_refused(trained, changed):
    run, rows = trained / "run", rows_of(trained / "run")
    refuse_changed(run, rows)
    other = replace(rows[0], completion="another")
    with pytest.raises(DataError, match="have changed"):
        refuse_changed(run, [other, *rows[1:]])
    assert digest_of([other, *rows[1:]]) != digest_of(rows)
    run = changed("seed: 0", "seed: 0")
    (run / "run.json").unlink()
    refuse_changed(run, [other])  # nothing was recorded


def test_a_split_of_a_saved_folder_is_read(changed, trained, tmp_path):
    rows = [json.loads(line) for line in (trained / "rows.jsonl").read_text().splitlines()]
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    run = changed(f"train: {trained / 'rows.jsonl'}", f"train: {tmp_path / 'saved'}@dev")
    assert [row.completion for row in rows_of(run)] == [row["completion"] for row in rows]


def test_a_run_that_was_moved_has_its_list_of_dropped_rows(base, tmp_path):
    few, drop = save_rows(tmp_path / "few.jsonl", 2), tmp_path / "drop.txt"
    pool = save_rows(tmp_path / "pool.jsonl", 8)
    drop.write_text(f"{pool}:3\n")
    given = recipe(base, pool, tmp_path / "run", method="dense", steps=1, target=str(few))
    train(replace(given, drop_rows=str(drop)), QUIET)
    drop.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    rows = rows_of(tmp_path / "moved")
    assert len(rows) > 7
    assert all(row.origin != f"{pool}:3" for row in rows)


def test_bad_rows_of_a_file_named_in_another_folder_are_left_out(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = save_rows(tmp_path / "rows.jsonl", 8)
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "long" * 40, "completion": "no token of it is left"}) + "\n")
    train(recipe(base, Path("rows.jsonl"), tmp_path / "run", method="dense", steps=1, bad_rows="drop"), QUIET)
    assert len(rows_of(tmp_path / "run")) == 8


def test_a_bad_row_stands_for_none_of_a_file_of_the_same_name(base, tmp_path):
    """Training rows in two folders, and held-out rows in a third."""
    files = [save_rows(tmp_path / f"{name}/rows.jsonl", 8) for name in ("one", "two", "held")]
    for file, line in zip(files, (2, 3, 4), strict=True):
        rows = file.read_text().splitlines()
        file.write_text("\n".join([*rows[: line - 1], json.dumps({"prompt": "no completion"}), *rows[line - 1 :]]))
    settings = {"train": tuple(map(str, files[:2])), "eval": str(files[2]), "bad_rows": "drop"}
    train(recipe(base, files[0], tmp_path / "run", method="dense", steps=1, **settings), QUIET)
    assert [row.completion for row in rows_of(tmp_path / "run")] == [str(i + i * i) for i in range(8)] * 2


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError):
        rows_of(tmp_path / "nope")
