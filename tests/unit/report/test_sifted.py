"""Sections on sifted rows and on rows like the bad ones."""

import json

import pytest
from support.report_runs import save_run

from siftune.report.sifted import avoided, sifted
from siftune.report.subjects import read_run

BY_TARGET = """place,score,loss_after,loss_before,similarity,selected,source,prompt,completion
pool.jsonl:1,-2.0,1.0,3.0,0.9,1,a,one,1
pool.jsonl:2,0.5,2.5,2.0,0.8,0,a,two,3
pool.jsonl:3,-1.0,1.0,2.0,0.1,0,b,three,3
pool.jsonl:4,-3.0,1.0,4.0,0.9,1,a,four,4
"""
BY_BAD = """place,score,loss_after,loss_before,selected,source,prompt,completion
pool.jsonl:1,1.0,3.0,2.0,1,(other),one,1
pool.jsonl:2,-2.0,1.0,3.0,0,(other),two,3
pool.jsonl:3,-0.5,1.5,2.0,1,(other),three,3
"""


@pytest.fixture
def run(tmp_path):
    folder = save_run(tmp_path / "run", steps=2)
    (folder / "sift" / "avoid").mkdir(parents=True)
    (folder / "sift" / "sift.json").write_text(json.dumps({"state": {"seconds": 90, "reason": "for reasons"}}))
    return folder


def column(grid, number):
    return [row[number].text for row in grid.rows]


def test_selected_rows_come_first(run):
    (run / "sift" / "scores.csv").write_text(BY_TARGET)
    section = sifted(read_run(run, "run"), several=False)
    assert section.words == ["2 of 4 rows of the pool were selected in 90 s: for reasons."]
    by_source, examples = section.tables
    assert [[cell.text for cell in row[:3]] for row in by_source.rows] == [["a", "3", "2"], ["b", "1", "0"]]
    assert column(examples, 1) == ["pool.jsonl:4", "pool.jsonl:1", "pool.jsonl:3", "pool.jsonl:2"]
    assert column(examples, 3) == ["selected", "selected", "left out", "left out"]
    assert avoided(read_run(run, "run"), several=False) is None


def test_rows_like_the_bad_ones_come_first(run):
    (run / "sift" / "avoid" / "scores.csv").write_text(BY_BAD)
    section = avoided(read_run(run, "run"), several=True)
    assert section.title == "Rows like the bad ones: run"
    assert section.words == ["1 of 3 rows of the pool were left out in 90 s: for reasons."]
    (examples,) = section.tables
    assert column(examples, 1) == ["pool.jsonl:2", "pool.jsonl:3", "pool.jsonl:1"]
    assert column(examples, 3) == ["left out", "selected", "selected"]
    assert len(examples.header) == len(examples.rows[0]) == 6
    assert sifted(read_run(run, "run"), several=True) is None


@pytest.mark.parametrize("text", ["place,score\na,1\n", BY_BAD.replace("-2.0", "nan"), "\0"])
def test_a_file_that_cannot_be_read_is_named(run, text):
    (run / "sift" / "avoid" / "scores.csv").write_text(text)
    assert "scores.csv cannot be read" in " ".join(avoided(read_run(run, "run"), several=False).words)
