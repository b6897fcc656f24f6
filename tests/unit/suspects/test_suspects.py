"""Suspect rows with their texts and reasons, on the screen and in a file."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support.commands import error_of, siftune
from support.tiny_run import recipe

from siftune.base.errors import DataError
from siftune.cli.main import main
from siftune.data.read import load_rows
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import resolve_recipe
from siftune.records.again import note_recipe
from siftune.records.rows import Text, digest_of, named_rows
from siftune.records.visits import NAME, Visits, write_visits
from siftune.report.rows import short, table, to_csv
from siftune.suspects import losses as module
from siftune.suspects.named import Suspect, suspects
from siftune.train.folder.run import LOSSES

RECORDS = [
    {"prompt": f"Say the name of number {i}, please", "completion": f"the name of it is {i * 7919}"} for i in range(100)
]
WRONG = [5, 9, *range(50, 60)]
HTML = "no idea, <script>alert(1)</script>"


@pytest.fixture
def scored(base, tmp_path, monkeypatch):
    """Builds a run folder of 100 rows with losses; those of WRONG are large, the first the largest."""
    monkeypatch.setattr(module, "_RARE", 30)

    def build(losses=None, sources=None, decoys=None, steps=100, gains=None):
        records = [*RECORDS]
        records[50] = {**RECORDS[5], "completion": HTML}
        if sources:
            records = [{**record, "source": source} for record, source in zip(records, sources, strict=True)]
        path, folder = tmp_path / "rows.jsonl", tmp_path / "run"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe_to_yaml(resolve_recipe(recipe(base, path, folder, method="dense"))))
        note_recipe(folder)
        about = digest_of(load_rows(str(path)))
        visits = np.stack([np.arange(100), np.arange(100) * steps // 100, np.ones(100), np.full(100, 3)])
        write_visits(folder / NAME, Visits.of(visits), about=about)
        if losses is None:
            losses = 0.1 + 0.1 * np.sin(np.arange(100))
            losses[WRONG] = 20 - np.arange(12)
        decoys = np.array([0, *range(1, 100, 2)] if decoys is None else decoys)
        row, decoy = np.concatenate([np.arange(100), decoys]), np.arange(100 + len(decoys)) >= 100
        summed = np.float32([*losses, *np.where((decoys < 60) | (sources is None), 9.0, 40.0)])
        columns = {"row": np.int32(row), "loss": summed, "tokens": np.full(len(row), 4, "int32"), "decoy": decoy}
        columns["elsewhere"] = summed + np.float32(np.nan if gains is None else [*gains, *np.zeros(len(decoys))])
        parquet.write_table(pyarrow.table(columns).replace_schema_metadata({"siftune": about}), folder / LOSSES)
        return folder

    return build


@pytest.fixture
def run(scored):
    return scored()


def test_rows_with_the_largest_losses_come_first(run):
    found = suspects(run)
    path = run.parent / "rows.jsonl"
    assert [each.place for each in found] == [f"{path}:{at + 1}" for at in WRONG]
    first, _, third, *_ = found
    assert first.text == (RECORDS[5]["prompt"], RECORDS[5]["completion"])
    assert first.score == 20.0
    assert first.reason.startswith("loss 20.0 nats, 5.00 per token; 100% of the answers swapped between rows have a ")
    assert first.reason.endswith(f"{path}:51 has the same prompt and another completion")
    assert third.text.completion == HTML
    assert [each.place for each in suspects(run, 1)] == [first.place]


def test_rows_are_compared_with_decoys_of_their_source(scored):
    losses = np.where(np.arange(100) < 60, 0.1, 15.0)
    losses[WRONG] = 9.0
    found = suspects(scored(losses, ["easy"] * 60 + ["hard"] * 40, range(100)))
    assert sorted(int(each.place.rpartition(":")[2]) - 1 for each in found) == WRONG
    assert "swapped between rows of easy" in found[0].reason


def test_rows_that_gain_from_their_prompts_are_not_suspect(scored):
    gains = np.full(100, 5.0)
    assert suspects(scored(gains=gains)) == []


def test_rows_that_gain_nothing_are_suspect(scored):
    gains = np.full(100, 5.0)
    gains[WRONG] = 0.0
    assert len(suspects(scored(gains=gains))) == len(WRONG)


def test_a_short_run_does_not_tell(scored, capsys):
    result, said = siftune(capsys, "rows", scored(steps=59))
    assert (result["suspects"], result["listed"]) == (0, [])
    assert "too short to tell" in said
    assert "59 steps" in said


@pytest.mark.parametrize("decoys", [range(0, 60), []])
def test_losses_that_do_not_tell(scored, capsys, decoys):
    folder = scored(np.linspace(0, 3, 100), decoys=decoys)
    result, said = siftune(capsys, "rows", folder)
    assert (result["suspects"], result["listed"]) == (0, [])
    assert "losses do not tell" in said
    assert "--drop-rows" not in said
    result, said = siftune(capsys, "rows", folder, "--top", 3)
    assert [each["score"] for each in result["listed"]] == pytest.approx([3.0, 2.9697, 2.9394], abs=1e-3)
    assert "losses do not tell" in said


def test_rows_that_have_changed_are_refused(run):
    path = run.parent / "rows.jsonl"
    path.write_text(path.read_text().replace("the name of it is 0", "the name of it is 1"))
    with pytest.raises(DataError, match=r"the training rows have changed since .*run was trained"):
        suspects(run)


def test_the_command_shows_and_writes_them(run, capsys):
    csv = run / "lists" / "bad.csv"
    result, said = siftune(capsys, "rows", run, "--csv", csv)
    assert (result["rows"], result["suspects"], len(result["listed"])) == (100, 12, 12)
    assert [each["text"][1] for each in result["listed"][:2]] == [RECORDS[i]["completion"] for i in (5, 9)]
    assert "--drop-rows" in said
    assert named_rows(str(csv)) == [each["place"] for each in result["listed"]]
    result, _ = siftune(capsys, "rows", run, "--top", 1)
    assert (result["suspects"], len(result["listed"])) == (12, 1)


def test_a_text_is_no_formula():
    assert ",'=1+1,'@x," in to_csv([Suspect("rows.jsonl:1", Text("=1+1", "@x"), "", 3.0)])


@pytest.mark.parametrize("text", ["a\u2028b", "a\x0cb", "a\x85b", "a\rb", "a\r\nb", 'a "b", c', "x" * 200_000])
def test_the_list_is_read_again_whatever_rows_say(tmp_path, text):
    path = tmp_path / "bad.csv"
    path.write_text(to_csv([Suspect(f"rows.jsonl:{line}", Text(text, text), "", 3.0) for line in (1, 2)]), "utf-8")
    assert named_rows(str(path)) == ["rows.jsonl:1", "rows.jsonl:2"]


def test_the_screen_has_at_most_fifteen_lines(run, capsys):
    assert main(["rows", str(run)]) == 0
    shown, said = capsys.readouterr()
    assert "12 of 100 rows" in shown
    assert "2 more with --top" in said
    assert len(f"{shown}{said}".splitlines()) <= 15


def test_mistakes_are_reported_in_a_sentence(run, capsys):
    gone = f"there is no run {run / 'nope'}: no such folder (working directory: {Path.cwd()})"
    assert error_of(capsys, "rows", run / "nope") == gone
    assert "--top is 0" in error_of(capsys, "rows", run, "--top", 0)
    assert "did you mean --csv" in error_of(capsys, "rows", run, "--cvs", "x")


def test_long_texts_are_cut_in_the_middle():
    assert short("a b\nc") == "a b c"
    assert len(short("x" * 200)) == 40


def test_nothing_in_a_row_reaches_the_terminal_as_a_command():
    found = table([Suspect("rows.jsonl:1", Text("a\x1b[2J\x07", "b\u202ec"), "", 3.0)], "")
    assert found.rows[0][2:] == ("a\\x1b[2J\\x07", "b\\u202ec")
