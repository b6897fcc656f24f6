"""Suspect rows with their texts and reasons, on the screen and in a file."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import error_of, siftune
from support.tiny_run import recipe

from siftune.base.errors import DataError
from siftune.cli.main import main
from siftune.data.decisions import read_decisions
from siftune.data.read import load_rows
from siftune.data.rows import Text
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import resolve_recipe
from siftune.recipe.training_rows import digest_of
from siftune.report.suspects import short, table, to_csv
from siftune.suspects.losses import Losses, write_losses
from siftune.suspects.named import Suspect, suspects
from siftune.train.folder.run_folder import LOSSES, RunFolder

RECORDS = [
    {"prompt": f"Say the name of number {i}, please", "completion": f"the name of it is {i * 7919}"} for i in range(100)
]
WRONG = [5, 9, *range(50, 60)]
HTML = "no idea, <script>alert(1)</script>"


@pytest.fixture
def scored(base, tmp_path):
    """Builds a run folder of 100 rows with losses; those of WRONG are large, the first the largest."""

    def build(losses=None, covered=0, further=0.0):
        records = [*RECORDS]
        records[50] = {**RECORDS[5], "completion": HTML}
        path, folder = tmp_path / "rows.jsonl", tmp_path / "run"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe_to_yaml(resolve_recipe(recipe(base, path, folder, method="dense"))))
        about = digest_of(load_rows(str(path)))
        RunFolder(folder).write_run(status="finished", rows=about)
        if losses is None:
            losses = 0.1 + 0.1 * np.sin(np.arange(100))
            losses[WRONG] = 13 - np.arange(12)
        numbers = np.arange(100, dtype=np.int32)
        loss, other_loss, usual = (np.float32(values) for values in (losses, np.ones(100), np.full(100, 9.0)))
        other_usual = np.where(loss > 2, usual + further, usual).astype(np.float32)
        every = Losses(
            numbers, np.full(100, 4, np.int32), numbers[::-1], numbers < covered, loss, other_loss, usual, other_usual
        )
        write_losses(folder / LOSSES, every, about)
        return folder

    return build


@pytest.fixture
def run(scored):
    return scored()


@pytest.mark.parametrize(("covered", "count"), [(49, 0), (50, 12)])
def test_if_rows_share_answers_the_prompts_alone_decide(scored, covered, count):
    losses = np.where(np.isin(np.arange(100), WRONG), 2.5, 0.1)  # exp(1.5) times as likely; exp(2.5) by the prompts
    assert len(suspects(scored(losses, covered, further=1.0))) == count


def test_rows_with_the_highest_scores_come_first(run):
    rows = suspects(run)
    path = run.parent / "rows.jsonl"
    assert [each.place for each in rows] == [
        f"{path}:{at + 1}" for at in WRONG[:10]
    ]  # 13 − 9 nats; then less than ln 10
    first, second, third, *_ = rows
    assert first.text == (RECORDS[5]["prompt"], RECORDS[5]["completion"])
    assert (first.score, second.score) == (12.0, 11.0)
    assert first.reason == f"“{RECORDS[94]['completion']}”, the answer of {path}:95, fits 162,755 times as well"
    assert third.text.completion == HTML
    assert [each.place for each in suspects(run, 1)] == [first.place]


def test_ratios_beyond_a_million_are_not_stated(scored):
    assert suspects(scored(np.repeat([90.0, 0.1], [10, 90])))[0].reason.endswith(", fits 1,000,000 times as well")


def test_losses_that_do_not_tell(scored, capsys):
    folder = scored(np.linspace(0, 3, 100))
    result, said = siftune(capsys, "rows", folder)
    assert (result["suspects"], result["listed"]) == (0, [])
    assert "in 66% of the rows" in said
    assert "--drop-rows" not in said
    result, said = siftune(capsys, "rows", folder, "--top", 3, "--csv", folder / "top.csv")
    assert [*read_decisions(str(folder / "top.csv")).selected.values()] == [True] * 3  # none is suspect
    assert [each["score"] for each in result["listed"]] == pytest.approx([2.0, 1.9697, 1.9394], abs=1e-3)
    assert result["listed"][0]["reason"].endswith(", fits 7.4 times as well")
    assert "No row is suspect" in said


def test_rows_that_have_changed_are_refused(run):
    path = run.parent / "rows.jsonl"
    path.write_text(path.read_text().replace("the name of it is 0", "the name of it is 1"))
    with pytest.raises(DataError, match=r"rows have changed since .*run"):
        suspects(run)


def test_an_edited_list_is_not_lost(run, capsys):
    csv = run.parent / "bad.csv"
    for _ in range(2):
        siftune(capsys, "rows", run, "--csv", csv)
    assert not [*run.parent.glob("*.edited*")]
    written = csv.read_text()
    csv.write_text(written.replace(",no,", ",yes,", 1))
    _, said = siftune(capsys, "rows", run, "--csv", csv)
    assert f"it is now {run.parent / 'bad.edited.csv'}" in said
    assert (run.parent / "bad.edited.csv").read_text() == written.replace(",no,", ",yes,", 1)
    assert csv.read_text() == written


def test_the_command_shows_and_writes_them(run, capsys):
    csv = run / "lists" / "bad.csv"
    result, said = siftune(capsys, "rows", run, "--csv", csv)
    assert (result["rows"], result["suspects"], len(result["listed"])) == (100, 10, 10)
    assert [each["text"][1] for each in result["listed"][:2]] == [RECORDS[i]["completion"] for i in (5, 9)]
    assert "--drop-rows" in said
    assert read_decisions(str(csv)).selected == {each["place"]: False for each in result["listed"]}
    header, first = csv.read_text().splitlines()[:2]
    assert header == "place,selected,score,source,prompt,completion,reason"
    assert f",no,12.00000,rows.jsonl,{RECORDS[5]['prompt']!r},".replace("'", '"') in first
    result, _ = siftune(capsys, "rows", run, "--top", 1)
    assert (result["suspects"], len(result["listed"])) == (10, 1)


def test_a_text_is_no_formula():
    assert ",'=1+1,'@x," in to_csv([Suspect("rows.jsonl:1", Text("=1+1", "@x"), "", 3.0)])


@pytest.mark.parametrize("text", ["a\u2028b", "a\x0cb", "a\x85b", "a\rb", "a\r\nb", 'a "b", c', "x" * 200_000])
def test_the_list_is_read_again_whatever_rows_say(tmp_path, text):
    path = tmp_path / "bad.csv"
    path.write_text(to_csv([Suspect(f"rows.jsonl:{line}", Text(text, text), "", 3.0) for line in (1, 2)]), "utf-8")
    assert read_decisions(str(path)).selected == {"rows.jsonl:1": False, "rows.jsonl:2": False}


def test_the_screen_has_at_most_fifteen_lines(run, capsys):
    assert main(["rows", str(run)]) == 0
    shown, said = capsys.readouterr()
    assert "10 of 100 rows" in shown
    assert len(f"{shown}{said}".splitlines()) <= 15


def test_mistakes_are_reported_in_a_sentence(run, capsys):
    gone = f"there is no run {run / 'nope'}: no such folder (working directory: {Path.cwd()})"
    assert error_of(capsys, "rows", run / "nope") == gone
    assert "--top is 0" in error_of(capsys, "rows", run, "--top", 0)
    assert "did you mean --csv" in error_of(capsys, "rows", run, "--cvs", "x")


def test_long_texts_are_cut_in_the_middle():
    assert short("a b\nc") == "a b c"
    assert len(short("x" * 200)) == 40


def test_the_folder_of_all_places_is_shown_once():
    def header_and_places(*places):
        found = table([Suspect(place, Text("a", "b"), "", 3.0) for place in places], "")
        return found.header[1], [row[1] for row in found.rows]

    assert header_and_places("/data/a.jsonl:1", "/data/b/c.parquet row 2") == (
        "place in /data/", ["a.jsonl:1", "b/c.parquet row 2"],
    )  # fmt: skip
    assert header_and_places("/data/a.jsonl:1", "/b/a.jsonl:2") == ("place in /", ["data/a.jsonl:1", "b/a.jsonl:2"])
    assert header_and_places("/data/a.jsonl:1", "owner/name@train row 2") == (
        "place", ["/data/a.jsonl:1", "owner/name@train row 2"],
    )  # fmt: skip


def test_nothing_in_a_row_reaches_the_terminal_as_a_command():
    found = table([Suspect("rows.jsonl:1", Text("a\x1b[2J\x07", "b\u202ec"), "", 3.0)], "")
    assert found.rows[0][2:] == ("a\\x1b[2J\\x07", "b\\u202ec")
