"""Run folders of another party: no file is read that the user has not named, and no data set is fetched."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from rich.console import Console
from support.commands import error_of, siftune
from support.tiny_run import recipe, save_rows

from siftune.base.errors import InputError
from siftune.recipe.again import UnnamedFiles, is_own, note_recipe, rows_again
from siftune.suspects.scoring import score_run
from siftune.train.run import train

QUIET = Console(quiet=True)
SECRET = "what nobody else may see"


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run on forty rows by this user, with scores."""
    place = tmp_path_factory.mktemp("trained")
    train(recipe(base, save_rows(place / "rows.jsonl", 40), place / "run", method="dense", steps=2), QUIET)
    score_run(place / "run", console=QUIET)
    return place


@pytest.fixture
def foreign(trained, tmp_path, monkeypatch):
    """Returns a function that copies the run, names something else in its recipe, and forbids data sets of the hub."""

    def fail(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", fail)
    shutil.copytree(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"

    def change(before=f"train: {trained / 'rows.jsonl'}", after="train: rows.jsonl"):
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
        return tmp_path / "run"

    return change


def test_texts_of_a_run_of_one_s_own_are_shown(trained, capsys):
    assert is_own(trained / "run")
    result, _ = siftune(capsys, "rows", trained / "run", "--top", 40)
    assert ["3 and 9?", "12"] in [listed["text"] for listed in result["listed"]]


@pytest.mark.parametrize("key", ["train", "target", "drop_rows"])
def test_no_file_is_read_that_the_recipe_of_another_party_names(foreign, trained, tmp_path, capsys, key):
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps({"prompt": SECRET, "completion": SECRET}) + "\n")
    before = f"train: {trained / 'rows.jsonl'}" if key == "train" else f"{key}: null"
    run = foreign(before, f"{key}: {secret}")
    sentence = error_of(capsys, "rows", run, "--csv", tmp_path / "rows.csv")
    assert f"--files {secret}" in sentence or f"{trained / 'rows.jsonl'} {secret}" in sentence
    siftune(capsys, "report", run, "-o", tmp_path / "page.html")
    assert SECRET not in sentence + (tmp_path / "page.html").read_text()
    assert "--files" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["openai/gsm8k", "/dev/zero"])
def test_neither_hub_nor_devices_are_asked(foreign, name, tmp_path, capsys):
    run = foreign(after=f"train: {name}")
    assert name in error_of(capsys, "rows", run)
    siftune(capsys, "report", run, "-o", tmp_path / "page.html")


def test_the_model_that_the_recipe_of_another_party_names_is_not_loaded(foreign, trained, base, capsys):
    run = foreign(after="train: /elsewhere/rows.jsonl")
    (run / "losses.parquet").unlink()
    words = ["rows", run, "--files", trained / "rows.jsonl"]
    assert "--base" in error_of(capsys, *words)
    assert siftune(capsys, *words, "--base", base)[0]["rows"] == 40


@pytest.mark.parametrize("kind", ["secret", "pipe", "endless"])
def test_the_template_that_the_recipe_of_another_party_names_is_not_read(
    foreign, trained, base, tmp_path, capsys, kind
):
    path = tmp_path / "template"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(SECRET if kind == "secret" else "{% for i in range(10**12) %}x{% endfor %}")
    run = foreign("template: none", f"template: {path}")
    (run / "losses.parquet").unlink()
    sentence = error_of(capsys, "rows", run, "--files", trained / "rows.jsonl", "--base", base)
    assert f"its chat template {path} is not read" in sentence
    assert SECRET not in sentence


def test_the_hub_is_not_asked_for_the_data_set_of_one_s_own_run_either(foreign):
    run = foreign(after="train: openai/gsm8k")
    note_recipe(run)
    with pytest.raises(UnnamedFiles, match="--files openai/gsm8k"):
        rows_again(run)


def test_a_split_of_a_saved_folder_is_read_again(foreign, trained, tmp_path):
    rows = [json.loads(line) for line in (trained / "rows.jsonl").read_text().splitlines()]
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    run = foreign(after=f"train: {tmp_path / 'saved'}@dev")
    note_recipe(run)
    assert [row.completion for row in rows_again(run)] == [row["completion"] for row in rows]


def test_texts_are_shown_if_the_user_names_the_files(foreign, trained, tmp_path, capsys):
    run = foreign(after="train: /elsewhere/rows.jsonl")
    with pytest.raises(UnnamedFiles, match=r"--files /elsewhere/rows.jsonl"):
        rows_again(run, [str(tmp_path / "other.jsonl")])
    result, _ = siftune(capsys, "rows", run, "--files", trained / "rows.jsonl", "--top", 40)
    assert ["3 and 9?", "12"] in [listed["text"] for listed in result["listed"]]


def test_target_and_dropped_rows_are_named_too(base, tmp_path):
    few, drop = save_rows(tmp_path / "few.jsonl", 2), tmp_path / "drop.txt"
    pool = save_rows(tmp_path / "pool.jsonl", 8)
    drop.write_text(f"{pool}:3\n")
    given = recipe(base, pool, tmp_path / "run", method="dense", steps=1, target=str(few))
    train(replace(given, drop_rows=str(drop)), QUIET)
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(f"{path.read_text()}# by another party\n")
    with pytest.raises(UnnamedFiles):
        rows_again(tmp_path / "run", [str(pool)])
    drop.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")  # with its own copy of the list
    rows = rows_again(tmp_path / "moved", [str(pool), str(few)])
    assert len(rows) > 7
    assert all(row.origin != f"{pool}:3" for row in rows)


def test_files_of_the_same_name_and_places_in_moved_files_are_found(base, tmp_path):
    """Of two files with one name, each is that in its own folder; dropped rows are at their new places."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_rows(tmp_path / name / "rows.jsonl", 8 if name == "a" else 9)
    files, drop = [str(tmp_path / name / "rows.jsonl") for name in ("a", "b")], tmp_path / "drop.txt"
    drop.write_text(f"{files[1]}:3\n")
    given = recipe(base, tmp_path / "a" / "rows.jsonl", tmp_path / "run", method="dense", steps=1)
    train(replace(given, train=tuple(files), drop_rows=str(drop)), QUIET)
    (tmp_path / "moved").mkdir()
    moved = [str(shutil.move(tmp_path / name, tmp_path / "moved")) + "/rows.jsonl" for name in ("a", "b")]
    rows = rows_again(tmp_path / "run", [*reversed(moved), str(drop)])
    assert [row.origin for row in rows if "/b/" in row.origin] == [f"{moved[1]}:{n}" for n in range(1, 10) if n != 3]
    assert sum("/a/" in row.origin for row in rows) == 8


def test_bad_rows_of_a_file_named_in_another_folder_are_left_out(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = save_rows(tmp_path / "rows.jsonl", 8)
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "long" * 40, "completion": "no token of it is left"}) + "\n")
    train(recipe(base, Path("rows.jsonl"), tmp_path / "run", method="dense", steps=1, bad_rows="drop"), QUIET)
    assert len(rows_again(tmp_path / "run")) == 8


def test_a_bad_row_stands_for_none_of_a_file_of_the_same_name(base, tmp_path):
    """Training rows in two folders, and held-out rows in a third."""
    files = [save_rows(tmp_path / f"{name}/rows.jsonl", 8) for name in ("one", "two", "held")]
    for file, line in zip(files, (2, 3, 4), strict=True):
        rows = file.read_text().splitlines()
        file.write_text("\n".join([*rows[: line - 1], json.dumps({"prompt": "no completion"}), *rows[line - 1 :]]))
    settings = {"train": tuple(map(str, files[:2])), "eval": str(files[2]), "bad_rows": "drop"}
    train(recipe(base, files[0], tmp_path / "run", method="dense", steps=1, **settings), QUIET)
    assert [row.completion for row in rows_again(tmp_path / "run")] == [str(i + i * i) for i in range(8)] * 2


def test_eval_reads_no_rows_that_the_recipe_of_another_party_names(foreign, trained, capsys):
    run = foreign("eval: null", f"eval: {trained / 'rows.jsonl'}")
    assert "--data FILE" in error_of(capsys, "eval", run)
    assert not (run / "eval.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml", "bad_rows.txt", "eval.json"])
def test_links_in_a_run_folder_are_not_followed_to_be_read(foreign, tmp_path, capsys, name):
    run = foreign()
    (tmp_path / "outside").write_bytes((run / name).read_bytes() if (run / name).exists() else b"")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "outside")
    for command in (["rows", run], ["report", run, "-o", tmp_path / "page.html"]):
        assert name in error_of(capsys, *command)
    assert not (tmp_path / "page.html").exists()


def test_a_list_that_cannot_be_written_is_told_of_and_does_not_end_a_run(trained, tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr("siftune.recipe.again.cache_root", lambda: tmp_path / "cache")
    note_recipe(trained / "run")
    assert "recipes.txt" in caplog.text
    assert not is_own(trained / "run")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError):
        rows_again(tmp_path / "nope")
