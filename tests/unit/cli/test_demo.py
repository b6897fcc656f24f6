"""`siftune demo` on a tiny model in the place of the packaged one."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from support.report_runs import save_run
from support.tiny_run import lines
from transformers import AutoModelForCausalLM

from siftune.cli import demo
from siftune.cli.main import main
from siftune.evaluate.measure import Metric
from siftune.recipe.read import load_recipe

RUNS = ("pool", "few", "target", "sifted")


@pytest.fixture(autouse=True, scope="module")
def tiny_model(base):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_MODEL", str(base))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a demo, its result, and what it said."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    with redirect_stdout(io.StringIO()) as shown, redirect_stderr(io.StringIO()) as said:
        assert main(["demo", "--steps", "2", "--rows", "8", "--target-rows", "8", "--out", str(out), "--json"]) == 0
    return out, json.loads(shown.getvalue()), said.getvalue()


def test_it_tunes_four_times_and_compares_the_models(finished, base):
    out, result, said = finished
    assert json.loads((out / "demo.json").read_text()) == result
    assert result["folder"] == str(out)
    assert {name: summary["steps"] for name, summary in result["runs"].items()} == dict.fromkeys(RUNS, 2)
    pairs = {pair: {row["metric"]: row for row in rows} for pair, rows in result["metrics"].items()}
    assert list(pairs) == [*(f"base-{name}" for name in RUNS), "target-sifted", "few-sifted"]
    for rows in pairs.values():
        assert set(rows) == {"exact_match", "choices", "choices_per_token"}
    for name in ("target", "few"):
        for metric, row in pairs[f"{name}-sifted"].items():
            assert row["base"] == pairs[f"base-{name}"][metric]["tuned"]
            assert row["tuned"] == pairs["base-sifted"][metric]["tuned"]
            assert row["difference"] == pytest.approx(row["tuned"] - row["base"])
    assert [len(lines(out / f"{name}.jsonl")) for name in ("pool", "few", "test")] == [32, 8, 8]
    for name in RUNS:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / name / "adapter")
    assert said.count("base: ") == said.count("sifted and few rows: ") == 4
    assert said.count("two-digit arithmetic, held out") == 2
    assert f"everything is in {out}" in said


def test_the_runs_differ_in_the_target_and_in_the_rows_that_are_left_out(finished):
    out, _, _ = finished
    pool, few, target, sifted = (load_recipe(out / name / "recipe.yaml") for name in RUNS)
    assert pool.target is None
    assert few.train == str(out / "few.jsonl")
    assert replace(few, train=pool.train, out=pool.out) == pool
    assert target.target == str(out / "few.jsonl")
    assert (pool.train, pool.steps, pool.lr, pool.seed) == (target.train, target.steps, target.lr, target.seed)
    assert (out / "sifted" / "sift" / "scores.csv").is_file()
    page = unescape((out / "report.html").read_text())
    assert "Similarity of prompts and scores" in page
    assert "of 32 rows of the pool were selected" in page
    drop = {None, str(out / "sifted" / "sift" / "dropped.csv")}
    assert sifted.drop_rows in drop
    assert sifted.from_adapter == str(out / "sifted" / "sift" / "tuning")
    assert replace(sifted, out=target.out, drop_rows=None, from_adapter=None) == target


def test_its_figures_are_those_of_siftune_eval(finished, capsys):
    out, result, _ = finished
    rows, answers = result["metrics"]["base-target"], json.loads((out / "target" / "eval.json").read_text())
    assert main(["eval", str(out / "target"), "--metrics", "exact_match", "choices", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["metrics"] == rows
    assert json.loads((out / "target" / "eval.json").read_text()) == answers


def metric(name, correct):
    """A rate of 8 questions."""
    return Metric(name, np.array([1.0] * correct + [0.0] * (8 - correct)), np.ones(8), ("an answer",) * 8)


@pytest.mark.parametrize(
    ("few", "target", "rival", "name", "points"),
    [(4, 2, "few", "few rows alone", "+50.0"), (2, 3, "target", "pool and few rows", "+62.5")],
)
def test_the_sifted_pool_is_compared_with_the_better_training_by_exact_match(
    tmp_path, monkeypatch, capsys, few, target, rival, name, points
):
    correct = {"base": 0, "pool": 1, "few": few, "target": target, "sifted": 8}

    def measure(recipes, console):
        for recipe in recipes.values():
            save_run(Path(recipe.out), steps=2)
        rates = {
            model: {one.name: one for one in (metric("choices", 8 - count), metric("exact_match", count))}
            for model, count in correct.items()
        }
        return rates, {model: {"seconds_with_sifting": 1.0} for model in recipes}

    monkeypatch.setattr(demo, "_measure", measure)
    out = tmp_path / "demo"
    assert main(["demo", "--steps", "2", "--rows", "8", "--target-rows", "8", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rival"] == rival
    difference, following = captured.err.splitlines()[-2:]
    better = f"“{name}”, the better of “pool and few rows” and “few rows alone”"
    assert f"“sifted and few rows” against {better}" in difference
    assert f"{points} points, 95 % interval" in difference
    assert following.endswith("`siftune train --train pool.jsonl --target few.jsonl --sift`")
    titles = [line for line in captured.err.splitlines() if line.startswith("two-digit arithmetic, held out")]
    assert titles[1].endswith(f"sifted and few rows against {name}")
    assert "wrong answers put in" in titles[0]
    page = unescape((out / "report.html").read_text())
    assert difference in page
    assert "wrong answers put in" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--rows", "0"], "--rows is 0"),
        (["--target-rows", "7"], "--target-rows is 7"),
        (["--lr", "-1"], "--lr is -1"),
        (["--steps", "5000"], "--steps 5000 takes 40300 problems of arithmetic"),
    ],
)
def test_what_it_refuses(tmp_path, capsys, flags, message):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("siftune: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not out.exists()
