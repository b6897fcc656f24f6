"""Sections on sifted pools: of a run, of a folder, and of the rows that a run was trained without."""

import re

import pytest
from support.report_runs import save_run

from siftune.base.errors import InputError
from siftune.base.work_folder import record_text
from siftune.report.charts import Part, histogram
from siftune.report.page import make_page, sections
from siftune.report.score_chart import score_chart
from siftune.report.sifted import left_out, of_run
from siftune.report.subjects import find_subjects, read_run
from siftune.sifting.choose import Limits

BY_TARGET = """place,selected,score,similarity,source,prompt,completion
pool.jsonl:1,yes,1.0,0.9,a,one,1
pool.jsonl:2,no,3.5,0.8,a,two,3
pool.jsonl:3,no,,0.1,b,three,3
pool.jsonl:4,yes,0.5,0.9,a,four,4
pool.jsonl:5,no,2.5,0.9,a,five,6
pool.jsonl:6,no,,0.3,b,six,6
"""
BY_BAD = """place,selected,score,loss_after,loss_before,source,prompt,completion
pool.jsonl:1,yes,1.0,3.0,2.0,(other),one,1
pool.jsonl:2,no,-2.0,1.0,3.0,(other),two,3
pool.jsonl:3,yes,-0.5,1.5,2.0,(other),three,3
"""


@pytest.fixture
def run(tmp_path):
    folder = save_run(tmp_path / "run", steps=2)
    (folder / "sift" / "avoid").mkdir(parents=True)
    save_record(folder)
    return folder


def save_record(run, **state):
    state = {"seconds": 90, "reason": "for reasons", **state}
    (run / "sift" / "sift.json").write_text(record_text({"model": "tiny"}, state))


def parts(run, several=False):
    return of_run(read_run(run, "run"), several)


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
    (section,) = parts(run)
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
    assert f"siftune report {run / 'sift'}" in examples.caption


def test_rows_next_to_the_limit_are_shown_first(run):
    """20 rows are selected, 20 left out by score, and 20 are of other tasks."""
    chosen = ["yes" if number < 20 else "no" for number in range(60)]
    lines = [f"p:{number},{chosen[number]},{number / 10 if number < 40 else ''},0.5,a,x,y" for number in range(60)]
    (run / "sift" / "scores.csv").write_text("\n".join([BY_TARGET.splitlines()[0], *lines]))
    ((examples,),) = [section.tables for section in parts(run)]
    assert examples.first == 10
    assert column(examples, 1)[:10] == [f"p:{number}" for number in range(15, 25)]
    assert column(examples, 0)[10:] == [*map(str, (1, 2, 3, 4, 5, 56, 57, 58, 59, 60))]
    page = make_page([str(run)]).html
    assert "10 more rows" in page
    table = page.partition("First the last rows")[2].partition("</table>")[0]
    assert re.findall(r'<tr( class="later")?>\s*<td', table) == [""] * 10 + [' class="later"'] * 10


def test_shares_by_completion(run):
    """Of ten rows with yes, three are selected; of ten with no, none."""
    lines = [f"p:{at},{'yes' if at < 3 else 'no'},1.0,0.9,a,x,{'true' if at < 10 else 'false'}" for at in range(20)]
    (run / "sift" / "scores.csv").write_text("\n".join([BY_TARGET.splitlines()[0], *lines, "p:21,no,,0.1,a,x,other"]))
    by_completion, _ = parts(run)[0].tables
    assert [[cell.text for cell in row[:3]] for row in by_completion.rows] == [
        ["true", "10", "3"],
        ["false", "10", "0"],
    ]


def test_a_share_may_select_rows_of_other_tasks(run):
    (run / "sift" / "scores.csv").write_text(BY_TARGET.replace(",no,", ",yes,"))
    (section,) = parts(run)
    assert section.words == ["6 of 6 rows of the pool were selected in 90 s: for reasons."]
    assert column(section.tables[1], 1) == [f"pool.jsonl:{number}" for number in (1, 5, 2, 6, 3, 4)]
    assert column(section.tables[1], 0) == ["2", "3", "4", "5", "6", "1"]


def test_rows_below_a_limit_on_similarity_are_of_other_tasks_though_they_have_a_score(run):
    (run / "sift" / "scores.csv").write_text(BY_TARGET)
    save_record(run, similarity_limit=0.85, score_limit=2.0)
    (section,) = parts(run)
    assert section.words[1] == "Left out: 3 rows of other tasks and 1 row of the task by score."
    assert column(section.tables[1], 1)[-3:] == [f"pool.jsonl:{number}" for number in (2, 6, 3)]


def test_rows_like_the_bad_ones_are_not_left_out_by_score(run):
    """Row 4 has the lowest score of all, and is like the bad rows."""
    (run / "sift" / "scores.csv").write_text(BY_TARGET.replace("4,yes", "4,no"))
    (run / "sift" / "avoid" / "scores.csv").write_text(BY_BAD.replace("pool.jsonl:2", "pool.jsonl:4"))
    section, bad = parts(run)
    assert section.words[1] == (
        "Left out: 2 rows of other tasks, 2 rows of the task by score and 1 row of the task like the bad rows."
    )
    assert column(section.tables[1], 3)[:4] == [
        "selected", "left out: score", "left out: score", "left out: like the bad rows"
    ]  # fmt: skip
    assert bad.words == ["1 of 3 rows of the pool were left out."]


def test_bad_rows_in_the_pool_have_no_numbers(run):
    (run / "sift" / "scores.csv").write_text(f"{BY_TARGET}pool.jsonl:7,no,,,a,seven,8\n")
    (run / "sift" / "avoid" / "scores.csv").write_text(f"{BY_BAD}pool.jsonl:7,no,,,,a,seven,8\n")
    section, bad = parts(run)
    assert section.words[1].endswith("1 row of the task by score and 2 rows of the task like the bad rows.")
    assert column(section.tables[1], 1) == [f"pool.jsonl:{number}" for number in (4, 1, 5, 2, 7, 6, 3)]
    assert column(section.tables[1], 5)[4] == "–"
    assert column(bad.tables[0], 1) == [f"pool.jsonl:{number}" for number in (7, 2, 3, 1)]
    assert column(bad.tables[0], 5)[0] == "–"
    assert "left out: 4" in drawing(section.figures[0])  # it cannot be drawn


def test_rows_like_the_bad_ones_come_first(run):
    (run / "sift" / "avoid" / "scores.csv").write_text(BY_BAD)
    (section,) = parts(run, several=True)
    assert section.title == "Rows like the bad ones: run"
    assert section.words == ["1 of 3 rows of the pool were left out in 90 s: for reasons."]
    (examples,) = section.tables
    assert column(examples, 1) == ["pool.jsonl:2", "pool.jsonl:3", "pool.jsonl:1"]
    assert column(examples, 3) == ["left out: like the bad rows", "selected", "selected"]
    assert column(examples, 5) == ["3.00 → 1.00", "2.00 → 1.50", "2.00 → 3.00"]
    assert len(examples.header) == len(examples.rows[0]) == 6
    limit, edges = places(section.figures[0])
    assert max(edges[1]) <= limit <= min(edges[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("place,score\na,1\n", "has no column 'selected'"),
        (BY_BAD.replace("-2.0", "nan"), "scores.csv:3 cannot be read (nan is no figure)"),
        (BY_BAD.replace("2,no", "2,perhaps"), "scores.csv:3 cannot be read (selected is 'perhaps'"),
        (BY_BAD.partition("\n")[0], "has no rows"),
        ("\0", "scores.csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(run, text, message):
    (run / "sift" / "scores.csv").write_text(BY_TARGET)
    (run / "sift" / "avoid" / "scores.csv").write_text(text)
    (section,) = parts(run)
    assert f"Not available: {run / 'sift' / 'avoid' / 'scores.csv'}" in section.words[0]
    assert message in section.words[0]


# --- the chart of similarities and scores


def marks(figure):
    """Places of dots, and of the middle of crosses."""
    dots = re.search(r'd="([^"]*)" class="dots', drawing(figure))[1]
    crosses = re.search(r'd="([^"]*)" class="crosses', drawing(figure))[1]
    lines = re.findall(r"M(\S+) (\S+)L(\S+) (\S+)M", crosses)
    middles = [((float(a) + float(c)) / 2, (float(b) + float(d)) / 2) for a, b, c, d in lines]
    return [(float(x), float(y)) for x, y in re.findall(r"M(\S+) (\S+)h0", dots)], middles


def lines_of(figure):
    return [
        [tuple(map(float, end.split())) for end in path.split("L")]
        for path in re.findall(r'<path d="M([^"]*)" class="line', drawing(figure))
    ]


def test_limits_divide_selected_and_other_rows():
    selected, others = [(0.8, 0.5), (0.9, 1.99)], [(0.85, 2.01), (0.59, None), (0.3, None)]
    figure = score_chart(selected, others, Limits(score=2.0, similarity=0.6))
    dots, crosses = marks(figure)
    ((x, top), (same, bottom)), ((_, y), (_, level)) = lines_of(figure)
    assert (x, y) == (same, level)
    assert all(place > x and height > y for place, height in dots)
    assert crosses[0][0] > x
    assert top < crosses[0][1] < y
    assert all(place < x and top <= height < crosses[0][1] for place, height in crosses[1:])
    assert top < bottom
    assert "selected: 2" in drawing(figure)
    assert "left out: 3" in drawing(figure)


def test_without_limits_there_are_no_lines():
    figure = score_chart([(0.8, 0.5)], [(0.1, None)], Limits())
    assert lines_of(figure) == []
    assert lines_of(score_chart([(0.8, 0.5)], [(0.8, 0.9)], Limits(similarity=0.5)))[0][0][0] > 0


def test_rows_without_any_score_are_drawn():
    dots, crosses = marks(score_chart([], [(0.1, None), (0.2, None)], Limits(similarity=0.5)))
    assert (len(dots), len(crosses)) == (0, 2)
    assert crosses[0][1] != crosses[1][1]


def test_a_few_high_scores_do_not_flatten_the_others():
    figure = score_chart([(0.5, number / 1000) for number in range(1000)], [(0.5, 1e6)], Limits(score=1.0))
    dots, (cross,) = marks(figure)
    heights = [y for _, y in dots]
    assert max(heights) - min(heights) > 200
    assert cross[1] == pytest.approx(38, abs=0.1)  # the upper end of the axis


def test_at_most_a_thousand_rows_of_each_kind_are_drawn():
    figure = score_chart([(0.5, number / 5000) for number in range(5000)], [(0.4, 2.0)], Limits())
    dots, _ = marks(figure)
    assert len(dots) == 1000
    assert dots[0][1] > dots[-1][1]
    assert "At most 1,000" in figure.note
    assert "selected: 5,000" in drawing(figure)


# --- the folder of a sifted pool, and the rows that a run was trained without


def test_a_folder_of_sift(run):
    (run / "sift" / "scores.csv").write_text(BY_TARGET)
    save_record(run, score_limit=2.0, similarity_limit=0.5)
    subjects = find_subjects([str(run / "sift")])
    own = sections(subjects)
    assert [section.title for section in own] == ["Sifted rows", "Review"]
    assert len(own[0].tables) == 1  # no examples: the review has the rows
    page = make_page([str(run / "sift")]).html
    assert "2 of 6 rows of the pool are selected (33.3\u00a0%)." in page
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.partition("<main>")[0]) == [
        ("model", "tiny"), ("rows of the pool", "6"), ("selected", "2"), ("limit on the score", "2.00"),
        ("limit on similarity", "0.500"),
    ]  # fmt: skip


def test_a_folder_without_scores_is_refused_and_passed_over_among_others(run, tmp_path):
    with pytest.raises(InputError, match="has no scores yet"):
        find_subjects([str(run / "sift")])
    (run / "sift").rename(tmp_path / "sifted")
    subjects = find_subjects([str(tmp_path)])
    assert (len(subjects.runs), len(subjects.siftings)) == (1, 0)
    (tmp_path / "sifted" / "avoid" / "scores.csv").write_text(BY_BAD)
    subjects = find_subjects([str(tmp_path)])
    assert [sifting.name for sifting in subjects.siftings] == ["sifted"]
    titles = [section.title for section in sections(subjects)]
    assert titles[:2] == ["Rows like the bad ones", "Review"]


def dropped(tmp_path, file, name="run"):
    run = save_run(tmp_path / name, steps=2, drop_rows=str(file))
    return left_out(read_run(run, name), several=False)


def test_a_run_without_the_rows_of_a_list(tmp_path):
    file = tmp_path / "suspects.csv"
    file.write_text("place,selected,score,source,prompt,completion\np:1,no,1,a,x,y\np:2,yes,1,a,x,y\n")
    words = f"The training left out the rows that `{file}` excludes: 1 row and any copies."
    section = dropped(tmp_path, file)
    assert (section.title, section.words) == ("Rows left out", [words])
    assert "<h2>Rows left out</h2>" in make_page([str(tmp_path / "run")]).html
    file.unlink()
    assert "Not available: " in dropped(tmp_path, file, name="again").words[0]


def test_a_run_that_sifted_has_one_section_on_it(run):
    (run / "sift" / "scores.csv").write_text(BY_TARGET)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub("drop_rows: .*", f"drop_rows: {run / 'sift' / 'dropped.csv'}", recipe))
    assert read_run(run, "run").recipe.drop_rows is not None
    assert left_out(read_run(run, "run"), several=False) is None


# --- histograms


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
