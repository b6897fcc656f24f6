"""`siftune demo` on a tiny model in the place of the packaged one."""

import json

import pytest
from peft import PeftModel
from support.tiny_run import lines
from transformers import AutoModelForCausalLM

from siftune.cli import demo
from siftune.cli.main import main
from siftune.methods import METHODS
from siftune.recipe_file import load_recipe


@pytest.fixture(autouse=True)
def tiny_model(base, monkeypatch):
    monkeypatch.setattr(demo, "_MODEL", str(base))


def test_it_measures_tunes_and_measures_again(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["demo", "--steps", "2", "--rows", "8", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert json.loads((out / "demo.json").read_text()) == result
    assert result["run"] == str(out)
    assert result["steps"] == 2
    metrics = {row["metric"]: row for row in result["metrics"]}
    assert set(metrics) == {"exact_match", "choices", "choices_per_token"}
    for row in metrics.values():
        assert 0 <= row["base"] <= 1
        assert row["difference"] == pytest.approx(row["tuned"] - row["base"])
    assert len(lines(out / "train.jsonl")) == 32
    assert len(lines(out / "test.jsonl")) == 8
    train, test = (
        {(row["kind"], *sorted((row["a"], row["b"]))) for row in lines(out / name)}
        for name in ("train.jsonl", "test.jsonl")
    )
    assert not train & test
    recipe = load_recipe(out / "recipe.yaml")
    assert (recipe.method, recipe.steps, recipe.model) == ("ist", 2, str(base))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    assert captured.err.count("before: ") == captured.err.count("after: ") == 4
    assert "two-digit arithmetic, held out" in captured.err
    assert f"everything is in {out}" in captured.err
    assert "Traceback" not in captured.err


def test_its_run_can_be_evaluated(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["demo", "--steps", "2", "--rows", "4", "--out", str(out), "--method", "dense"]) == 0
    told = capsys.readouterr().err
    assert f"everything is in {out}" in told
    measured = {row["metric"]: row["tuned"] for row in json.loads((out / "demo.json").read_text())["metrics"]}
    assert main(["eval", str(out), "--data", str(out / "test.jsonl"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    (run,) = again["runs"]
    for row in run["metrics"]:
        if row["metric"] in measured:
            assert row["tuned"] == measured[row["metric"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps and --rows must be at least 1, and --lr above 0"),
        (["--rows", "0"], "--steps and --rows must be at least 1, and --lr above 0"),
        (["--lr", "-1"], "--steps and --rows must be at least 1, and --lr above 0"),
        (["--steps", "5000"], "80000 arithmetic rows"),
        (["--method", "lissa"], f"--method must be one of {', '.join(METHODS)}, not 'lissa'"),
    ],
)
def test_what_it_refuses(tmp_path, capsys, flags, message):
    assert main(["demo", "--out", str(tmp_path / "run"), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("siftune: error: ")
    assert captured.err.count("\n") == 1


def test_a_folder_that_holds_a_run_is_refused(tmp_path, capsys):
    arguments = ["demo", "--steps", "1", "--rows", "4", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    before = (tmp_path / "run" / "train.jsonl").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"siftune: error: {tmp_path}/run holds a run already; give another folder with --out.\n"
    )
    assert (tmp_path / "run" / "train.jsonl").read_bytes() == before
