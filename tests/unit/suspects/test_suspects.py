"""Which rows are named, in which order, with which words; and what becomes of them."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from support.commands import error_of, siftune
from support.tiny_run import recipe

from siftune.base.errors import DataError
from siftune.cli.main import main
from siftune.data.read import load_rows
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import resolve_recipe
from siftune.records.again import note_recipe
from siftune.records.rows import Text, digest_of, named_rows
from siftune.records.visits import NAME, Visits, read_visits, write_visits
from siftune.report.rows import short, table, to_csv
from siftune.suspects import named as module
from siftune.suspects.named import Suspect, suspects

RECORDS = [
    {"prompt": f"Say the name of number {i}, please", "completion": f"the name of it is {i * 7919}"} for i in range(40)
]


@pytest.fixture
def run(base, tmp_path):
    """A run folder of 40 rows in two epochs, of which the rows 5 and 9 cost much, and 7 a little more in the second."""
    records = [*RECORDS]
    records[30] = {**RECORDS[5], "completion": "no idea, <script>alert(1)</script>"}
    records[31] = {"prompt": RECORDS[9]["prompt"].upper(), "completion": RECORDS[9]["completion"]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = tmp_path / "run"
    folder.mkdir()
    settings = resolve_recipe(recipe(base, path, folder, method="dense"))
    (folder / "recipe.yaml").write_text(recipe_to_yaml(settings))
    note_recipe(folder)
    rows = load_rows(str(path))
    order = np.random.default_rng(0).permutation(40)
    row = np.concatenate([order, order[::-1]])
    loss = 1 + 0.1 * np.sin(row)
    loss[row == 5], loss[row == 9], loss[40:][order[::-1] == 7] = 4.0, 3.0, 1.2
    table = np.stack([row, np.arange(80) // 4, loss, np.full(80, 3), *np.full((2, 80), np.nan)])
    write_visits(folder / NAME, Visits.of(table), [each.origin for each in rows], digest_of(rows))
    return folder


def test_the_dearest_come_first(run):
    first, second = suspects(run)
    path = run.parent / "rows.jsonl"
    assert (first.place, second.place) == (f"{path}:6", f"{path}:10")
    assert first.text == (RECORDS[5]["prompt"], RECORDS[5]["completion"])
    assert first.score > second.score > 3
    assert re.search(r"^loss 4.00 nats per token on average over 2 visits, where \d.\d\d was usual; ", first.reason)
    assert first.reason.endswith(f"{path}:31 has the same prompt and another completion")
    assert second.duplicates == (f"{path}:32",)
    assert first.duplicates == ()
    assert [each.place for each in suspects(run, 1)] == [first.place]


@pytest.fixture
def two_sources(base, tmp_path, monkeypatch):
    """Builds a run of 40 rows whose first 30 cost 1 and whose last 10 cost 5, but for the 4th, which costs 4."""
    monkeypatch.setattr(module, "_RARE", 10)

    def build(files, **columns):
        per = 40 // files
        for file in range(files):
            records = [
                {**RECORDS[i], **{k: v[i] for k, v in columns.items()}} for i in range(file * per, (file + 1) * per)
            ]
            (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        paths = tuple(str(tmp_path / f"{file}.jsonl") for file in range(files))
        folder = tmp_path / "run"
        folder.mkdir()
        settings = resolve_recipe(replace(recipe(base, paths[0], folder, method="dense"), train=paths))
        (folder / "recipe.yaml").write_text(recipe_to_yaml(settings))
        note_recipe(folder)
        rows = [row for path in paths for row in load_rows(path)]
        row = np.random.default_rng(0).permutation(40)
        loss = np.where(row < 30, 1.0, 5.0) + 0.1 * np.sin(row)
        loss[row == 3] = 4.0
        table = np.stack([row, np.arange(40) // 4, loss, np.full(40, 3), *np.full((2, 40), np.nan)])
        write_visits(folder / NAME, Visits.of(table), [each.origin for each in rows], digest_of(rows))
        return folder

    return build


def test_rows_are_compared_with_those_of_their_source(two_sources):
    (found,) = suspects(two_sources(1, source=["easy"] * 30 + ["hard"] * 10))
    assert found.place.endswith("0.jsonl:4")
    assert re.search(r"^loss 4.00 nats per token in step \d+, where 1.0\d was usual", found.reason)
    assert found.reason.endswith(" was usual for rows of easy")


def test_of_one_source_the_dear_task_is_named_too(two_sources):
    found = suspects(two_sources(1))
    assert len(found) == 11
    assert all(each.reason.endswith(" was usual") for each in found)


def test_a_file_is_a_source_and_rare_ones_are_one_together(two_sources, monkeypatch):
    run = two_sources(4)
    (found,) = suspects(run)
    assert found.reason.endswith(" was usual for rows of " + str(run.parent / "0.jsonl"))
    monkeypatch.setattr(module, "_RARE", 11)
    assert len(suspects(run)) == 11


def test_rows_of_one_place_are_one(run):
    record = read_visits(run / NAME)
    places = [*dict(zip(record.visits.row.tolist(), record.places, strict=True)).items()]
    words = [place for _, place in sorted(places)]
    words[5] = words[9]  # as if the 10th row came twice
    write_visits(run / NAME, record.visits, words)
    assert [each.place for each in suspects(run)] == [words[9]]


def test_without_a_recipe_there_are_numbers(run):
    (run / "recipe.yaml").unlink()
    record = read_visits(run / NAME)
    write_visits(run / NAME, record.visits)
    found = suspects(run)
    assert [each.place for each in found] == ["row 5", "row 9"]
    assert found[0].text == ("", "")


def test_rows_that_have_changed_are_refused(run):
    path = run.parent / "rows.jsonl"
    path.write_text(path.read_text().replace("the name of it is 0", "the name of it is 1"))
    with pytest.raises(DataError, match=r"the training rows have changed since .*run was trained"):
        suspects(run)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "does not exist, so no rows were recorded"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "cannot be read"),
        (lambda path: path.write_text("a,b"), "cannot be read"),
    ],
)
def test_a_damaged_record_is_refused(run, spoil, words):
    spoil(run / NAME)
    with pytest.raises(DataError, match=words):
        suspects(run)


def test_another_parquet_file_is_no_record(run):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"row": [1]}), run / NAME)
    with pytest.raises(DataError, match="has no column 'step', so it is no record of rows"):
        suspects(run)
    parquet.write_table(pyarrow.table({name: ["a"] for name in ("row", "step", "loss", "tokens")}), run / NAME)
    with pytest.raises(DataError, match="has columns of other types than a record of rows"):
        suspects(run)


def test_the_command_shows_and_writes_them(run, capsys):
    csv, page = run / "lists" / "bad.csv", run / "bad.html"
    result, said = siftune(capsys, "rows", run, "--csv", csv, "--html", page)
    assert (result["rows"], [each["text"][1] for each in result["suspects"]]) == (
        40,
        [RECORDS[i]["completion"] for i in (5, 9)],
    )
    assert "--drop-rows" in said
    assert csv.read_text().startswith("place,score,prompt,completion,reason,duplicates\n")
    text = page.read_text()
    assert "2 of 40 rows" in text
    assert "http" not in text
    assert "<script" not in text
    assert "at least" not in text
    result, _ = siftune(capsys, "rows", run, "--top", 1, "--html", page)
    assert len(result["suspects"]) == 1
    assert "at least 1 of 40 rows" in page.read_text()


def test_what_is_in_a_row_is_no_markup_and_no_formula(run, capsys):
    record = read_visits(run / NAME)
    loss = record.visits.loss.copy()
    loss[np.flatnonzero(record.visits.row == 30)[0]] = 20.0
    changed = Visits(**{**vars(record.visits), "loss": loss})
    places = dict(zip(record.visits.row.tolist(), record.places, strict=True))
    write_visits(run / NAME, changed, [places[row] for row in range(40)], record.about)
    _, _ = siftune(capsys, "rows", run, "--html", run / "bad.html")
    text = (run / "bad.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    (worst, *_) = suspects(run)
    formula = type(worst)(worst.place, type(worst.text)("=1+1", "@x"), worst.reason, worst.score)
    assert ",'=1+1,'@x," in to_csv([formula])


@pytest.mark.parametrize("text", ["a\u2028b", "a\x0cb", "a\x85b", "a\rb", "a\r\nb", 'a "b", c', "x" * 200_000])
def test_the_list_is_read_again_whatever_rows_say(tmp_path, text):
    path = tmp_path / "bad.csv"
    path.write_text(to_csv([Suspect(f"rows.jsonl:{line}", Text(text, text), "", 3.0) for line in (1, 2)]), "utf-8")
    assert named_rows(str(path)) == ["rows.jsonl:1", "rows.jsonl:2"]


def test_the_screen_has_at_most_fifteen_lines(two_sources, capsys):
    assert main(["rows", str(two_sources(1))]) == 0
    shown, said = capsys.readouterr()
    assert "1 more with --top" in said
    assert len(f"{shown}{said}".splitlines()) <= 15


def test_mistakes_are_told_in_a_sentence(run, capsys):
    assert (
        error_of(capsys, "rows", run / "nope")
        == f"there is no run folder {run / 'nope'}; give one that siftune train has made."
    )
    assert "--top is 0" in error_of(capsys, "rows", run, "--top", 0)
    assert "did you mean --csv" in error_of(capsys, "rows", run, "--cvs", "x")
    (run / NAME).unlink()
    assert "no rows were recorded" in error_of(capsys, "rows", run)


def test_long_texts_are_cut_in_the_middle():
    assert short("a b\nc") == "a b c"
    assert len(short("x" * 200)) == 40


def test_nothing_in_a_row_reaches_the_terminal_as_a_command():
    found = table([Suspect("rows.jsonl:1", Text("a\x1b[2J\x07", "b\u202ec"), "", 3.0)], "")
    assert found.rows[0][2:] == ("a\\x1b[2J\\x07", "b\\u202ec")
