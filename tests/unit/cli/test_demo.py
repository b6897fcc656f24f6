"""`siftune demo` on a tiny model in the place of the packaged one."""

import json
from dataclasses import replace

import pytest
from peft import PeftModel
from support.tiny_run import lines
from transformers import AutoModelForCausalLM

from siftune.cli import demo
from siftune.cli.main import main
from siftune.recipe.read import load_recipe

RUNS = ("pool", "target", "sifted")


@pytest.fixture(autouse=True)
def tiny_model(base, monkeypatch):
    monkeypatch.setattr(demo, "_MODEL", str(base))


def test_it_tunes_three_times_and_compares_each_model_with_the_one_before(base, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--steps", "2", "--rows", "8", "--known", "8", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert json.loads((out / "demo.json").read_text()) == result
    assert result["folder"] == str(out)
    assert {name: summary["steps"] for name, summary in result["runs"].items()} == dict.fromkeys(RUNS, 2)
    pairs = ("base-pool", "pool-target", "target-sifted")
    first, second, third = ({row["metric"]: row for row in result["metrics"][pair]} for pair in pairs)
    assert set(first) == set(second) == set(third) == {"exact_match", "choices", "choices_per_token"}
    for name in first:
        assert (first[name]["tuned"], second[name]["tuned"]) == (second[name]["base"], third[name]["base"])
        assert second[name]["difference"] == pytest.approx(second[name]["tuned"] - second[name]["base"])
    assert [len(lines(out / f"{name}.jsonl")) for name in ("pool", "few", "test")] == [32, 8, 8]
    for name in RUNS:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / name / "adapter")
    assert captured.err.count("base: ") == captured.err.count("sifted and few: ") == 4
    assert captured.err.count("two-digit arithmetic, held out") == 2
    assert f"everything is in {out}" in captured.err
    assert "Traceback" not in captured.err


def test_the_runs_differ_in_the_target_and_in_the_rows_that_are_left_out(base, tmp_path):
    out = tmp_path / "demo"
    given = ["demo", "--steps", "2", "--rows", "4", "--out", str(out)]
    assert main(given) == 0
    pool, target, sifted = (load_recipe(out / name / "recipe.yaml") for name in RUNS)
    assert pool.target is None
    assert target.target == str(out / "few.jsonl")
    assert (pool.train, pool.steps, pool.lr, pool.seed) == (target.train, target.steps, target.lr, target.seed)
    assert (out / "sifted" / "sift" / "scores.csv").is_file()
    drop = {None, str(out / "sifted" / "sift" / "dropped.csv")}
    assert sifted.drop_rows in drop
    assert replace(sifted, out=target.out, drop_rows=None) == target


def test_its_runs_can_be_evaluated(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--steps", "2", "--rows", "4", "--out", str(out)]) == 0
    rows = json.loads((out / "demo.json").read_text())["metrics"]["pool-target"]
    measured = {row["metric"]: row["tuned"] for row in rows}
    capsys.readouterr()
    assert main(["eval", str(out / "target"), "--data", str(out / "test.jsonl"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    again = {row["metric"]: row["tuned"] for row in run["metrics"]}
    assert {name: again[name] for name in measured if name in again} == {
        name: value for name, value in measured.items() if name in again
    }
    assert "exact_match" in again or "choices" in again


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--rows", "0"], "--rows is 0"),
        (["--known", "7"], "--known is 7"),
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


def test_a_folder_that_is_there_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
