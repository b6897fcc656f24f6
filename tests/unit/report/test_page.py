"""What stands on the page: sentences, sections, figures; and that nothing foreign gets in."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from support.report_runs import save_eval, save_run

from siftune.base.errors import InputError, RecipeError
from siftune.base.json_files import read_sealed, sealed, unsealed
from siftune.data.rows import Text
from siftune.evaluate.measure import MetricRow
from siftune.report import show
from siftune.report.comparable import basis_of
from siftune.report.compare import headline
from siftune.report.evals import Answer, Eval, read_evals, record_eval
from siftune.report.page import make_page, sections
from siftune.report.run_page import _suspect_table
from siftune.report.subjects import find_subjects, read_run
from siftune.suspects.named import Suspect

ATTACK = "<script>alert(1)</script>\"'><b>&amp;"


def subjects(*folders):
    return find_subjects([str(folder) for folder in folders])


def titles(*folders):
    return [section.title for section in sections(subjects(*folders))]


def eval_json(rows, more=""):
    """An untrusted record."""
    metric = f'{{"metric": "choices", "base": 0.5, "rows": {rows}}}'
    record = f'{{"data": "x", "rows": 1, "level": 0.9, "answers": [], "metrics": [{metric}{more}]}}'
    return json.dumps([sealed(json.loads(record))])


def rename_data(run, name):
    """Have the measurements of a run be of other rows."""
    records = [unsealed(record) | {"data": name} for record in json.loads((run / "eval.json").read_text())]
    (run / "eval.json").write_text(json.dumps([*map(sealed, records)]))


def text_of(section):
    """All words of a section."""
    cells = (cell.text for grid in section.tables for row in grid.rows for cell in row)
    return " ".join([*section.words, *cells, *(figure.note for figure in section.figures)])


# --- the result in a sentence


def test_one_run_against_its_base(runs):
    assert headline(subjects(runs["dense"])).replace("\u00a0", " ") == (
        "On 200 held-out rows, exact match went from 3.0 % to 50.0 %: +47.0 points, 95 % interval +41.0 to +54.0."
    )


def test_several_runs_the_best_first(runs):
    told = headline(subjects(*runs.values())).replace("\u00a0", " ")
    assert told.startswith("“gast” is best of 3 runs: 70.0 % exact match (95 % interval 64.0 % to 76.0 %)")
    assert "against 60.0 % for “ist”, 50.0 % for “dense” and 3.0 % for the base model" in told


def test_of_a_run_that_went_on_the_time_is_known_from_then_on(tmp_path):
    folders = [save_run(tmp_path / name, seed=seed) for seed, name in enumerate(("whole", "resumed"))]
    record = read_sealed(folders[1] / "run.json", dict[str, Any])
    record["summary"]["resumed_step"] = 30
    (folders[1] / "run.json").write_text(json.dumps(sealed(record)))
    compared = sections(subjects(*folders))[0]
    assert [row[4].text for row in compared.tables[0].rows] == ["62 s", "70 s, after step 30"]
    by_time, by_memory = (figure.draw(600) for figure in compared.figures)
    assert ("resumed" in by_time, "resumed" in by_memory, "whole" in by_time) == (False, True, True)


def test_a_run_that_was_not_measured(tmp_path):
    run = save_run(tmp_path / "run")
    assert headline(subjects(run)) == "After 40 steps the held-out loss is 0.7000 nats per token."
    assert "siftune eval" in " ".join(text_of(section) for section in sections(subjects(run)))


def test_the_interval_is_as_wide_as_it_was_measured(tmp_path):
    for number, name in enumerate("ab"):
        metric = MetricRow("choices", 9, 0.2, 0.5 + number / 10, 0.3, 0.1, 0.5, (0.1, 0.3), (0.4, 0.6))
        record_eval(save_run(tmp_path / name), Eval("test.jsonl", 9, 0.8, (metric,)))
    both = subjects(tmp_path / "a", tmp_path / "b")
    for told in (headline(subjects(tmp_path / "a")), headline(both), text_of(sections(both)[0])):
        assert "80\u00a0% interval" in told
        assert "95\u00a0%" not in told


def test_a_measurement_of_the_base_alone(tmp_path):
    runs = [save_run(tmp_path / name) for name in "ab"]
    for run in runs:
        record_eval(run, Eval("test.jsonl", 9, 0.95, (MetricRow("choices", 9, 0.5),)))
    assert "lowest held-out loss" in headline(subjects(*runs))
    (runs[0] / "eval.json").write_text(eval_json('1, "tuned": 0.6', ', {"metric": "choices", "base": 1, "rows": 1}'))
    (runs[1] / "eval.json").write_text(eval_json("1"))
    assert headline(subjects(*runs)).endswith("on 1 held-out row, against 50.0\u00a0% for the base model.")


def test_equal_runs_are_named_together(tmp_path):
    named = [save_run(tmp_path / name) for name in "abc"]
    for run, tuned in zip(named, (0.5, 0.6, 0.6), strict=True):
        save_eval(run, tuned=tuned)
    told = headline(subjects(*named)).replace("\u00a0", " ")
    assert told.startswith("“b” and “c” are equally good, the best of 3 runs: 60.0 %")
    assert "against 50.0 % for “a” and" in told


def test_a_hub_id_is_not_cut(tmp_path):
    named = [save_run(tmp_path / name) for name in "ab"]
    for run in named:
        save_eval(run)
        rename_data(run, "owner/set@test")
    compared, *others = sections(subjects(*named))
    assert "exact match on owner/set@test;" in text_of(compared)
    assert any("rows of owner/set@test, the same" in text_of(each) for each in others)


def test_shares_of_different_rows_are_not_compared(tmp_path):
    first, second = (save_run(tmp_path / n, eval=None, eval_share=0.1, train=f"{n}.jsonl") for n in "ab")
    assert headline(subjects(first, second)) == "2 runs, not measured on the same held-out rows."
    assert "“a” and “b” are not compared" in text_of(sections(subjects(first, second))[0])


def test_a_run_on_other_rows_does_not_keep_the_others_from_being_compared(tmp_path):
    named = [save_run(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    for number, run in enumerate(named):
        save_eval(run, tuned=0.5 + number / 10)
    rename_data(named[2], "others.jsonl")
    assert headline(subjects(*named)).startswith("“b” is best of 2 comparable runs: 60.0")
    compared = sections(subjects(*named))[0]
    assert [row[2].text for row in compared.tables[0].rows] == ["50.0\u00a0%", "60.0\u00a0%", "–"]
    assert "“c” is not compared" in text_of(compared)
    tuned = sections(subjects(*named))[2]
    assert [list(table.header) for table in tuned.tables[::2]] == [
        ["metric", "base", "a", "b"], ["metric", "base", "c"],
    ]  # fmt: skip
    assert "the same for the base model and “c”, with" in text_of(tuned)
    losses = [save_run(tmp_path / "losses" / name, eval=f"{name[0]}.jsonl") for name in ("a1", "a2", "b")]
    assert "lowest held-out loss of 2 comparable runs" in headline(subjects(*losses))


def test_runs_by_their_losses_where_they_were_held_to_the_same_rows(tmp_path):
    first, second = (save_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    assert headline(subjects(first, second)).startswith("“a” has the lowest held-out loss of 2 runs, 0.7000")
    others = ({"eval": "others.jsonl"}, {"completion_only": False}, {"model": "other"}, {"batch_size": 2})
    for number, settings in enumerate(others):
        third = save_run(tmp_path / f"c{number}", **settings)
        assert headline(subjects(first, third)) == "2 runs, not measured on the same held-out rows."


def test_runs_of_two_models_share_no_base_and_no_perplexity(tmp_path):
    runs = [save_run(tmp_path / name, model=name) for name in ("one", "two")]
    for number, run in enumerate(runs):
        save_eval(run, base=number / 10, tuned=0.5 + number / 10)
    assert headline(subjects(*runs)).replace("\u00a0", " ").endswith("on 200 held-out rows, against 50.0 % for “one”.")
    assert "the base model has" not in text_of(sections(subjects(*runs))[0])
    perplexity = MetricRow("perplexity", 200, 6.5, 1.7, -4.8, -5.2, -4.4)
    for run in runs:
        [measured] = read_evals(run)
        (run / "eval.json").unlink()
        record_eval(run, replace(measured, metrics=(perplexity,)))
    assert headline(subjects(*runs)) == "2 runs, not measured on the same held-out rows."


@pytest.mark.parametrize(("names", "digests", "same"), [("tt", "ab", False), ("tu", "aa", True)])
def test_measurements_are_compared_by_their_rows_whatever_the_file_is_called(tmp_path, names, digests, same):
    runs = [save_run(tmp_path / name) for name in ("one", "two")]
    for run, name, digest in zip(runs, names, digests, strict=True):
        metric = MetricRow("choices", 9, 0.2, 0.5, 0.3, 0.1, 0.5, (0.1, 0.3), (0.4, 0.6))
        record_eval(run, Eval(f"{name}.jsonl", 9, 0.95, (metric,), digest=digest))
    assert ("on 9 held-out rows" in headline(subjects(*runs))) == same
    [words] = [text_of(section) for section in sections(subjects(*runs)) if section.anchor == "results"]
    assert words.count("9 rows of") == (1 if same else 2)


def test_perplexity_is_better_when_less(tmp_path):
    for number, name in enumerate("ab"):
        run = save_run(tmp_path / name)
        metric = MetricRow("perplexity", 9, 6.0, 2.0 + number, number - 4.0, -5.0, -3.0)
        record_eval(run, Eval("test.jsonl", 9, 0.95, (metric,)))
    assert headline(subjects(tmp_path / "a", tmp_path / "b")).startswith("“a” is best of 2 runs: 2.000 perplexity on 9")
    assert "from 6.000 to 2.000: −4.00, 95\u00a0% interval −5.00 to −3.00" in headline(subjects(tmp_path / "a"))


@pytest.mark.parametrize("steps", [0, 12])
def test_a_run_that_is_under_way(tmp_path, steps):
    run = save_run(tmp_path / "run", steps=12)
    (run / "run.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:steps]) + '{"step": 13, "lo')
    told = headline(subjects(run))
    assert told.startswith("“run” is at step 11 of 12: training loss" if steps else "“run” has no logged step yet")
    assert make_page([str(run)]).html.count("<svg") == (6 if steps else 0)


# --- what is there


def test_a_run_has_the_sections_of_its_method(runs):
    common = ["Training", "Base and tuned models", "Suspect rows"]
    assert titles(runs["dense"]) == [*common, "Recipe, versions and hardware"]
    assert titles(runs["ist"])[3] == titles(runs["gast"])[3] == "Selected layers and rows"
    assert titles(*runs.values())[:3] == ["Comparison of runs", *common[:2]]


def test_the_answers_of_several_runs_are_one_table(runs):
    results = next(one for one in sections(subjects(*runs.values())) if one.anchor == "results")
    metrics, answers = results.tables
    assert [row[0].text for row in metrics.rows] == ["exact match", "multiple choice", "perplexity"]
    assert [*metrics.header] == ["metric", "base", *runs]
    assert metrics.rows[0][2].text.replace("\u00a0", " ") == "50.0 %\n+47.0 (+41.0 to +54.0)"
    assert [*answers.header] == ["row", "question", "reference", "base", *runs]
    assert (len(answers.rows), answers.first) == (20, 5)
    assert make_page([str(run) for run in runs.values()]).html.count("15 more rows") == 1


def test_a_folder_of_runs_is_a_report_on_all_of_them(tmp_path):
    for name in ("b", "target", "pool", "a"):
        save_run(tmp_path / name, steps=2)
    (tmp_path / "empty").mkdir()
    assert [run.name for run in subjects(tmp_path).runs] == ["pool", "target", "a", "b"]


def test_code_is_marked_up_and_backticks_are_not_shown(tmp_path):
    html = show(save_run(tmp_path / "<run>", steps=2)).html
    assert f"<code>siftune rows &#39;{tmp_path}/&lt;run&gt;&#39;</code>" in html
    assert "`" not in html.partition("<main>")[2].partition("<script>")[0]


@pytest.mark.parametrize("method", ["rst", "gast", "ist+gast"])
def test_every_method_that_chooses_has_a_section(tmp_path, method):
    run = save_run(tmp_path / "run", method, steps=12)
    (section,) = (section for section in sections(subjects(run)) if section.anchor.startswith("selection"))
    assert [figure.title for figure in section.figures] == ["Trained layers by step"] * (method != "gast")
    assert any("a layer followed" in words for words in section.words) == ("gast" in method)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", make_page([str(run)]).html, flags=re.DOTALL).lower()


def test_only_differences_of_recipes_are_listed(tmp_path):
    first = save_run(tmp_path / "a", "gast", steps=4)
    second = save_run(tmp_path / "b", "gast", steps=4, seed=1, lr=1e-3)
    (compared, *_) = sections(subjects(first, second))
    assert [row[0].text for row in compared.tables[1].rows] == ["lr", "seed"]
    (compared, *_) = sections(subjects(first, save_run(tmp_path / "c", "gast", steps=4)))
    assert compared.tables[1].rows == []
    assert "do not differ" in compared.tables[1].caption
    files = tuple(str(tmp_path / name) for name in ("pool.jsonl", "more.jsonl"))
    third = save_run(tmp_path / "d", "gast", steps=4, train=files)
    (compared, *_) = sections(subjects(first, third))
    assert [cell.text for cell in compared.tables[1].rows[0]] == ["train", "pool.jsonl", "pool.jsonl, more.jsonl"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    first, second = (save_run(tmp_path / name / "run", steps=2) for name in "ab")
    assert [run.name for run in subjects(first, second, first).runs] == ["a/run", "b/run"]


def test_the_losses_of_a_private_run_come_with_a_warning(tmp_path):
    run = save_run(tmp_path / "run", steps=4, dp_epsilon=8.0, dp_delta=1e-5)
    assert "without noise" in text_of(sections(subjects(run))[0])


def test_suspect_rows_are_shown_with_their_text(tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", steps=2)
    found = [Suspect("/data/pool.jsonl:7", Text("2 + 2?", ATTACK), ATTACK, 4.25)]
    scored = SimpleNamespace(suspects=1, rows=[None] * 30, highest=lambda count: found[:count])
    monkeypatch.setattr("siftune.report.run_page.ScoredRows", lambda path: scored)
    hint = next(section for section in sections(subjects(run)) if section.title == "Suspect rows")
    assert f"siftune rows {run}" in hint.words[0]
    assert not hint.tables
    (run / "losses.parquet").write_bytes(b"there")
    section = next(section for section in sections(subjects(run)) if section.title == "Suspect rows")
    (row,) = section.tables[0].rows
    assert [cell.text for cell in row] == ["pool.jsonl:7", f"2 + 2? → {ATTACK}", ATTACK, "4.25"]
    assert row[0].hint == "/data/pool.jsonl:7"
    (tmp_path / "other").mkdir()
    (save_run(tmp_path / "other" / "run", steps=2) / "losses.parquet").write_bytes(b"there")
    both = next(one for one in sections(subjects(run, tmp_path / "other" / "run")) if one.anchor == "suspects")
    assert [cell.text for cell in both.tables[0].rows[0]][3:5] == ["4.25", "4.25"]
    assert section.words[0].startswith("1 of 30 rows may be wrong.")
    page = show(run).html
    assert ATTACK not in page
    assert "2 + 2? → &lt;script&gt;alert(1)&lt;/script&gt;" in page
    scored.suspects, scored.doubt = 0, "The losses do not tell"
    assert "The losses do not tell" in show(run).html


def test_scores_of_rows_that_cannot_be_read(tmp_path):
    run = save_run(tmp_path / "run", steps=2)
    (run / "losses.parquet").write_bytes(b"damaged")
    section = next(section for section in sections(subjects(run)) if section.title == "Suspect rows")
    assert section.words[0].startswith("Not available: ")


# --- how large, how safe


def test_a_long_run_of_a_large_model_fits(tmp_path):
    run = save_run(tmp_path / "run", "ist+gast", steps=1500, depth=80)
    long = Answer("long " * 999, "x" * 9999, "y" * 9999, "z" * 9999, False, True)
    save_eval(run, answers=(long,) * 20)
    assert len(make_page([str(run)]).html.encode()) < 3e6


def test_everything_foreign_is_escaped(tmp_path, monkeypatch):
    run = save_run(tmp_path / "<b>&amp;'\"", "gast", steps=4, model=ATTACK, train=ATTACK, eval=ATTACK)
    save_eval(run, answers=(Answer(ATTACK, ATTACK, ATTACK, ATTACK, False, True),))
    record = read_sealed(run / "run.json", dict[str, Any])
    record |= {"status": ATTACK, "hardware": ATTACK, "versions": {ATTACK: ATTACK}}
    (run / "run.json").write_text(json.dumps(sealed(record)))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": ATTACK, ATTACK: 1.0}) + "\n")
    monkeypatch.setattr("support.report_runs.KINDS", (ATTACK, "</script>", "</svg>"))
    other = save_run(tmp_path / "other", "gast", steps=4)
    for html in (show(run).html, show(other).html, show(run, other).html):
        plain = html.replace("</script>\n</figure>", "")  # the ends of our own data
        assert plain.count("</script>") == html.count("<script>") == 1
        assert html.count("</svg>") == html.count("<svg ")
        assert "<b>&" not in html
        assert '<b>"' not in html
    assert "&lt;script&gt;" in show(run).html


def test_half_a_surrogate_pair_does_no_harm(tmp_path):
    run = save_run(tmp_path / "run", steps=2)
    save_eval(run, answers=(Answer("\ud800", "\x00", "\u202e", "x", False, True),))
    assert "<bdi>?</bdi>" in show(run).write(tmp_path / "page.html").read_text(encoding="utf-8")


# --- files


def test_names_that_are_written_alike_are_told_apart(tmp_path):
    runs = [save_run(tmp_path / name, "gast", steps=4) for name in ("run 2", "run", "Run", "run-2", "Ä", "Ö")]
    anchors = [section.anchor for section in sections(subjects(*runs))]
    assert len(set(anchors)) == len(anchors)


def test_what_was_measured_is_kept_once_for_each_file_of_rows(tmp_path):
    run = save_run(tmp_path / "run", steps=2)
    save_eval(run, tuned=0.2)
    record_eval(run, Eval("others.jsonl", 7, 0.9, (MetricRow("choices", 7, 0.5),)))
    save_eval(run, tuned=0.9)
    others, newest = read_evals(run)
    assert (others.data, others.metrics) == ("others.jsonl", (MetricRow("choices", 7, 0.5),))
    assert newest.metrics[0].tuned == 0.9
    assert newest.answers[1].prompt == "What is 1 + 8?\nAnswer:"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "[]", r"run.json cannot be read \(Input should be an object\)"),
        ("run.json", "{", "run.json cannot be read"),
        (
            "eval.json",
            json.dumps([sealed({"data": 1})]),
            "eval.json .*remove it",
        ),
        ("eval.json", "{", "eval.json cannot be read"),
        ("eval.json", "[" * 99_999, "eval.json cannot be read"),
        ("eval.json", json.dumps([sealed({"metrics": ["x"], "answers": []})]), "eval.json cannot be read"),
        ("eval.json", eval_json("7").replace("7", "8"), "eval.json .*not what was written"),
        ("eval.json", eval_json("1e999"), "eval.json cannot be read"),
        ("eval.json", eval_json('1, "tuned": 1' + "0" * 400), "eval.json cannot be read"),
        ("eval.json", eval_json('1, "tuned_interval": [1]'), "eval.json cannot be read"),
        ("selections.parquet", "nonsense", "selections.parquet is damaged"),
        ("recipe.yaml", "methodd: ist\n", "unknown key 'methodd'"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    run = save_run(tmp_path / "run", steps=2)
    (run / name).write_text(content)
    with pytest.raises(InputError, match=message):
        show(run)


def test_damaged_lines_of_metrics_are_left_out_with_a_warning(tmp_path, caplog):
    run = save_run(tmp_path / "run", steps=2)
    sound = read_run(run, "run").metrics
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(f"nonsense\n{'[' * 99_999}\n{text}" + '{"step": 3')
    assert read_run(run, "run").metrics == sound
    assert f"{run / 'metrics.jsonl'}: damaged lines are left out: 3" in caplog.text


def test_folders_that_hold_nothing_are_told(tmp_path, runs):
    with pytest.raises(RecipeError, match="nope: there is none of that name"):
        show(tmp_path / "nope")
    with pytest.raises(RecipeError, match="it has no run"):
        show(tmp_path)
    with pytest.raises(RecipeError, match="give the folder of a run"):
        show()
    with pytest.raises(RecipeError, match=r"cannot be written \(it is a folder\)"):
        show(runs["dense"]).write(tmp_path)


def test_the_suspects_of_several_runs_are_in_order_of_their_highest_score():
    rows = {name: Suspect(name, Text("?", "!"), "", 0.0) for name in ("a", "b", "c")}
    scores = {"one": {"a": 9.0, "b": 5.0}, "two": {"a": 1.0, "c": 7.0}}
    found = {run: [replace(rows[name], score=score) for name, score in own.items()] for run, own in scores.items()}
    assert [row[0].text for row in _suspect_table(found).rows] == ["a", "c", "b"]


def test_a_share_of_none_is_a_measurement(tmp_path):
    runs = [save_run(tmp_path / name / "run", steps=2) for name in ("one", "two")]
    for run in runs:
        save_eval(run, tuned=0.0)
    basis = basis_of(subjects(*runs).runs)
    assert basis.metric
    assert len(basis.runs) == 2
