"""Sections on sifted rows and on rows like the bad ones."""

import json
import re

import pytest
from support.report_runs import save_run

from siftune.report.charts import Part, histogram
from siftune.report.page import make_page
from siftune.report.sifted import avoided, sifted
from siftune.report.subjects import read_run

BY_TARGET = """place,score,similarity,selected,source,prompt,completion
pool.jsonl:1,1.0,0.9,1,a,one,1
pool.jsonl:2,3.5,0.8,0,a,two,3
pool.jsonl:3,,0.1,0,b,three,3
pool.jsonl:4,0.5,0.9,1,a,four,4
pool.jsonl:5,2.5,0.9,0,a,five,6
pool.jsonl:6,,0.3,0,b,six,6
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


def drawing(figure):
    return str(figure.draw(548))


def places(figure):
    """Places of the limit's line and of the bars of both colours."""
    line = re.search(r'<path d="M([0-9.]+) [^"]*" class="line', drawing(figure))
    bars = re.findall(r'<path d="([^"]*)" class="dot c(.)"', drawing(figure))
    edges = {int(colour): [float(x) for x in re.findall(r"[MH]([0-9.]+)", path)] for path, colour in bars}
    return None if line is None else float(line[1]), edges


def test_rows_by_the_target(run):
    (run / "sift" / "scores.csv").write_text(BY_TARGET)
    section = sifted(read_run(run, "run"), several=False)
    assert section.words == [
        "2 of 6 rows of the pool were selected in 90 s: for reasons.",
        "Left out: 2 rows of other tasks and 2 rows of the task by score.",
    ]
    by_source, examples = section.tables
    assert [[cell.text for cell in row[:3]] for row in by_source.rows] == [["a", "4", "2"], ["b", "2", "0"]]
    assert column(examples, 1) == [f"pool.jsonl:{number}" for number in (4, 1, 5, 2, 6, 3)]
    assert column(examples, 3) == [*["selected"] * 2, *["left out: score"] * 2, *["left out: other task"] * 2]
    assert column(examples, 4) == ["0.500", "1.00", "2.50", "3.50", "–", "–"]
    assert examples.header[-1] == "prompt"
    assert avoided(read_run(run, "run"), several=False) is None


def test_rows_next_to_the_limit_are_shown_first(run):
    """20 rows are selected, 20 left out by score, and 20 are of other tasks."""
    lines = [f"p:{number},{number / 10 if number < 40 else ''},0.5,{int(number < 20)},a,x,y" for number in range(60)]
    (run / "sift" / "scores.csv").write_text("\n".join([BY_TARGET.splitlines()[0], *lines]))
    (examples,) = sifted(read_run(run, "run"), several=False).tables
    assert examples.first == 10
    assert column(examples, 1)[:10] == [f"p:{number}" for number in range(15, 25)]
    assert column(examples, 0)[10:] == [*map(str, (1, 2, 3, 4, 5, 56, 57, 58, 59, 60))]
    page = make_page([str(run)]).html
    assert "10 more rows" in page
    table = page.partition("First the last rows")[2].partition("</table>")[0]
    assert re.findall(r'<tr( class="later")?>\s*<td', table) == [""] * 10 + [' class="later"'] * 10


def test_the_limit_divides_the_scores(run):
    """A bar would have both scores next to the limit if it did not begin there."""
    text = BY_TARGET.replace(",1.0,", ",2.1,").replace(",2.5,", ",2.15,").replace(",3.5,", ",9.0,")
    (run / "sift" / "scores.csv").write_text(text)
    (figure,) = sifted(read_run(run, "run"), several=False).figures
    limit, edges = places(figure)
    assert max(edges[0]) <= limit <= min(edges[1])
    assert "selected: 2" in drawing(figure)
    assert "left out: 2" in drawing(figure)  # rows of other tasks have no score


def test_without_contradictions_there_is_no_limit(run):
    """All rows of the task are selected; those with the most similar prompts come first among the others."""
    (run / "sift" / "scores.csv").write_text(BY_TARGET.replace(",0,a,", ",1,a,"))
    section = sifted(read_run(run, "run"), several=False)
    assert section.words[1] == "Left out: 2 rows of other tasks."
    assert places(section.figures[0])[0] is None
    assert column(section.tables[1], 1)[-2:] == ["pool.jsonl:6", "pool.jsonl:3"]


def test_a_share_may_select_rows_of_other_tasks(run):
    (run / "sift" / "scores.csv").write_text(re.sub(r",0,([ab]),", r",1,\1,", BY_TARGET))
    section = sifted(read_run(run, "run"), several=False)
    assert section.words == ["6 of 6 rows of the pool were selected in 90 s: for reasons."]
    assert column(section.tables[1], 1) == [f"pool.jsonl:{number}" for number in (1, 5, 2, 6, 3, 4)]
    assert column(section.tables[1], 0) == ["2", "3", "4", "5", "6", "1"]


def test_without_rows_of_the_task_there_is_no_chart(run):
    (run / "sift" / "scores.csv").write_text("\n".join(BY_TARGET.splitlines()[number] for number in (0, 3, 6)))
    section = sifted(read_run(run, "run"), several=False)
    assert section.figures == []
    assert len(section.tables[0].rows) == 2


def test_rows_like_the_bad_ones_are_not_left_out_by_score(run):
    """Row 4 has the lowest score of all, and is like the bad rows."""
    (run / "sift" / "scores.csv").write_text(BY_TARGET.replace("0.5,0.9,1,a", "0.5,0.9,0,a"))
    bad = BY_BAD.replace("pool.jsonl:2", "pool.jsonl:4")
    (run / "sift" / "avoid" / "scores.csv").write_text(bad)
    section = sifted(read_run(run, "run"), several=False)
    assert section.words[1] == (
        "Left out: 2 rows of other tasks, 2 rows of the task by score and 1 row of the task like the bad rows."
    )
    assert column(section.tables[1], 3)[:4] == [
        "selected", "left out: score", "left out: score", "left out: like the bad rows"
    ]  # fmt: skip
    limit, edges = places(section.figures[0])
    assert max(edges[0]) <= limit


def test_rows_like_the_bad_ones_come_first(run):
    (run / "sift" / "avoid" / "scores.csv").write_text(BY_BAD)
    section = avoided(read_run(run, "run"), several=True)
    assert section.title == "Rows like the bad ones: run"
    assert section.words == ["1 of 3 rows of the pool were left out in 90 s: for reasons."]
    (examples,) = section.tables
    assert column(examples, 1) == ["pool.jsonl:2", "pool.jsonl:3", "pool.jsonl:1"]
    assert column(examples, 3) == ["left out: like the bad rows", "selected", "selected"]
    assert column(examples, 5) == ["3.00 → 1.00", "2.00 → 1.50", "2.00 → 3.00"]
    assert len(examples.header) == len(examples.rows[0]) == 6
    limit, edges = places(section.figures[0])
    assert max(edges[1]) <= limit <= min(edges[0])
    assert sifted(read_run(run, "run"), several=True) is None


@pytest.mark.parametrize(
    "text", ["place,score\na,1\n", BY_BAD.replace("-2.0", "nan"), BY_BAD.replace("-2.0", ""), "\0"]
)
def test_a_file_that_cannot_be_read_is_named(run, text):
    (run / "sift" / "scores.csv").write_text(BY_TARGET)
    (run / "sift" / "avoid" / "scores.csv").write_text(text)
    for section in (sifted, avoided):
        assert "avoid/scores.csv cannot be read" in " ".join(section(read_run(run, "run"), several=False).words)


def test_bars_of_the_second_part_are_on_those_of_the_first():
    drawn = drawing(histogram("t", (Part("a", [1.0, 1.0, 2.0], 0), Part("b", [1.0, 3.0], 1)), ("x", "y")))
    first, second = re.findall(r'<path d="([^"]*)" class="dot', drawn)
    (bottom, top), *_ = re.findall(r"M[0-9.]+ ([0-9.]+)V([0-9.]+)", first)
    (low, high), (alone, _) = re.findall(r"M[0-9.]+ ([0-9.]+)V([0-9.]+)", second)
    assert (low, alone) == (top, bottom)
    assert float(low) - float(high) == pytest.approx((float(bottom) - float(top)) / 2, abs=0.2)


def test_a_few_far_values_do_not_widen_the_bars():
    values = [*(number / 1000 for number in range(1000)), 1e6]
    _, edges = places(histogram("t", (Part("a", values, 0), Part("b", [], 1)), ("x", "y")))
    assert len(edges[0]) > 2 * 35  # two edges of each bar
    assert "a: 1,001" in drawing(histogram("t", (Part("a", values, 0), Part("b", [], 1)), ("x", "y")))


@pytest.mark.parametrize("limit", [None, 2.0, -1.0, 5.0])
def test_equal_values_make_one_bar(limit):
    _, edges = places(histogram("t", (Part("a", [2.0] * 3, 0), Part("b", [], 1)), ("x", "y"), limit))
    assert len(edges[0]) == 2
