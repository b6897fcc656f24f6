"""The cost of selecting rows: what is measured, what is not measured again, and the table."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from lab import baselines, gast_cost
from lab.baseline_trainer import BaselineTrainer
from lab.gast_cost import BASELINES, Case, collect, table
from lab.random_llama import save_llama
from siftune.base.errors import DataError, RecipeError
from siftune.bench.cost import MEASURED, Measurement, measure
from siftune.bench.worker import build_trainer
from siftune.bench.workload import Workload
from siftune.methods.gast.callback import GAST
from siftune.models.load import load_model
from siftune.train.trainer import SiftTrainer

FACTS = {"dtype": "float32", "hardware": "one machine"}
FACTS["versions"] = {"torch": "2", "transformers": "5", "peft": "0.2", "siftune": "0.1"}
WORK = Workload("a model", batch_size=4, length=16, rank=4, steps=2, warmup=1)
CASE = Case("a case", WORK, "/where/it/is")


class Machine:
    """Stands for a process that measures: methods take different times, and it breaks down after some measurements."""

    def __init__(self, last=99, facts=FACTS):
        self.calls, self.last, self.facts = [], last, facts

    def __call__(self, method, number, work, threads, worker):
        if len(self.calls) == self.last:
            raise KeyboardInterrupt
        self.calls.append((work.model, method, number))
        assert worker == gast_cost.WORKER
        seconds = len(method) * (number + 1.0) ** (1 if method == "dense" else 2)
        return Measurement(method, number, (seconds, 3 * seconds), 100.0 * len(method), self.facts)


def test_measurements_that_are_there_are_not_made_again(tmp_path):
    out, methods = tmp_path / "cost.jsonl", ["dense", "ist"]
    whole = collect([CASE], methods, 2, 1, tmp_path / "whole.jsonl", Machine())
    broken = Machine(last=3)
    with pytest.raises(KeyboardInterrupt):
        collect([CASE], methods, 2, 1, out, broken)
    with out.open("a") as file:
        file.write('{"workload": {"mo')  # what a full disk or a crash may leave
    going_on = Machine()
    moved = replace(CASE, model="/where/it/is/now")
    assert [m for _, m in collect([moved], methods, 2, 1, out, going_on)] == [m for _, m in whole]
    assert Counter(call[1:] for call in broken.calls + going_on.calls) == Counter(
        [("dense", 0), ("ist", 0), ("dense", 1), ("ist", 1)]
    )
    assert going_on.calls[0][0] == "/where/it/is/now"
    more = Machine()
    collect([moved], [*methods, "greats"], 3, 1, out, more)
    assert {call[1:] for call in more.calls} == {("greats", 0), ("greats", 1), *((m, 2) for m in [*methods, "greats"])}
    assert len(out.read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("change", "threads"), [({"batch_size": 5}, 1), ({"model": "other"}, 1), ({"steps": 3}, 1), ({}, 2)]
)
def test_another_workload_is_measured_anew(tmp_path, change, threads):
    out, machine = tmp_path / "cost.jsonl", Machine()
    collect([CASE], ["dense"], 1, 1, out, machine)
    collect([replace(CASE, work=replace(WORK, **change))], ["dense"], 1, threads, out, machine)
    assert len(machine.calls) == 2


@pytest.mark.parametrize("change", [{"hardware": "another"}, {"versions": {**FACTS["versions"], "torch": "3"}}])
def test_machines_and_versions_are_not_mixed(tmp_path, change):
    out = tmp_path / "cost.jsonl"
    collect([CASE], ["dense"], 1, 1, out, Machine())
    with pytest.raises(DataError, match=f"measured with {next(iter(change))} .*another --out"):
        collect([CASE], ["dense", "ist"], 1, 1, out, Machine(facts={**FACTS, **change}))
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize("text", ["notes", '{"a": 1}\n', "[1]\n", "not json\n", "\n"])
def test_other_files_are_left_alone(tmp_path, text):
    out = tmp_path / "notes.txt"
    out.write_text(text)
    with pytest.raises(DataError, match="something else"):
        collect([CASE], ["dense"], 1, 1, out, Machine())
    assert out.read_text() == text


def test_rounds_rotate_and_go_over_all_cases():
    machine = Machine()
    cases = [CASE, Case("b", replace(WORK, length=8), "/b")]
    results = collect(cases, ["dense", "ist", "greats"], 2, 1, None, machine)
    assert [call[1:] for call in machine.calls[:6]] == 2 * [("dense", 0), ("ist", 0), ("greats", 0)]
    assert [call[1:] for call in machine.calls[6:]] == 2 * [("ist", 1), ("greats", 1), ("dense", 1)]
    assert [model for model, _, _ in machine.calls] == 2 * (3 * [CASE.model] + 3 * ["/b"])
    assert [(case.name, len(found)) for case, found in results] == [("a case", 6), ("b", 6)]


def test_the_table_has_medians_and_the_range_of_the_ratios():
    results = collect([CASE], ["dense", "ist", "greats"], 3, 1, None, Machine())
    lines = table(results, "dense")
    assert lines[0] == "| method | s/step | × dense | peak MB | × dense |"
    assert lines[2:5] == [
        "| dense | 20 | 1.00 (1.00–1.00) | 500 | 1.00 (1.00–1.00) |",
        "| ist | 24 | 1.20 (0.60–1.80) | 300 | 0.60 (0.60–0.60) |",
        "| greats | 48 | 2.40 (1.20–3.60) | 600 | 1.20 (1.20–1.20) |",
    ]
    assert "3 rounds of 2 steps after 1; a model in float32, 4 rows of 16 tokens, 25%" in lines[6]
    assert lines[7] == "one machine; torch 2, transformers 5, peft 0.2, siftune 0.1."
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_pooled_steps_are_not_swayed_by_a_burst():
    steps = {("dense", 0): (2.0, 2.0), ("dense", 1): (60.0, 2.0), ("greats", 0): (3.0, 3.0), ("greats", 1): (3.0, 99.0)}
    found = [Measurement(method, number, seconds, 1.0, {}) for (method, number), seconds in steps.items()]
    lines = gast_cost.pooled([(Case("one", None, ""), found)], "dense")
    assert lines[2:] == ["| one | dense | 2 | 1.00 |", "| one | greats | 3 | 1.50 |"]


def test_the_table_of_several_cases_names_them():
    cases = [CASE, Case("b", WORK, "/b")]
    lines = table(collect(cases, ["dense"], 1, 1, None, Machine()), "dense")
    assert lines[0].startswith("| case | method |")
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| a case", "| b"]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[5].startswith("1 round of 2 steps")


def test_the_sweep_varies_one_factor_at_a_time(tmp_path):
    args = gast_cost._parse(["--sweep", "--batch-size", "4", "--length", "8"])
    cases = gast_cost._sweep(args, tmp_path)
    shapes = [(case.work.batch_size, case.work.length, case.work.model) for case in cases]
    assert len(set(shapes)) == len({case.name for case in cases}) == 6
    assert {b for b, _, _ in shapes} == {1, 4, 16}
    assert {t for _, t, _ in shapes} == {4, 8, 32}
    assert len({model for _, _, model in shapes}) == 2
    for shape in shapes[1:]:
        assert sum(one != other for one, other in zip(shape, shapes[0], strict=True)) == 1
    depths = {case.work.model: load_model(case.model)[0].config.num_hidden_layers for case in cases}
    assert {model: f"{layers} layers" in model for model, layers in depths.items()} == dict.fromkeys(depths, True)
    assert set(depths.values()) == {8, 30}


def test_defaults_give_the_sweep_of_the_readme():
    args = gast_cost._parse(["--sweep"])
    assert (args.batch_size, args.length, gast_cost._LAYERS) == (16, 128, (8, 30))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    model = save_llama(tmp_path_factory.mktemp("llama"), layers=2, hidden=16, longest=32)
    return replace(WORK, model=model, seed=3)


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_are_trained_with_the_settings_of_siftunes_method(method, work, tmp_path):
    kind, like = BASELINES[method]
    trainer = gast_cost.build(method, work, tmp_path / "ours")
    assert type(trainer) is BaselineTrainer
    assert type(trainer.baseline) is getattr(baselines, kind)
    theirs = build_trainer(like, work, tmp_path / "theirs")
    gast = next(callback for callback in theirs.callback_handler.callbacks if isinstance(callback, GAST))
    assert trainer.baseline.settings.to_dict() == gast.to_dict()
    assert trainer.baseline.generator.initial_seed() == gast.seed == work.seed
    assert not any(isinstance(callback, GAST) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.state.global_step == work.warmup + work.steps
    assert trainer.baseline.last.selected.shape == (2, 2)
    assert trainer._label_logits_only is True


def test_siftunes_methods_are_its_own(work, tmp_path):
    for method in ("gast-rest", "greats"):
        assert type(gast_cost.build(method, work, tmp_path)) is SiftTrainer


def test_a_baseline_is_measured_in_a_fresh_process(work):
    found = measure("store-all", 1, work, threads=1, worker=gast_cost.WORKER)
    assert (found.method, found.round, len(found.seconds)) == ("store-all", 1, 2)
    assert found.facts["dtype"] == "float32"


def test_methods_are_siftunes_and_the_baselines():
    assert set(gast_cost._methods(gast_cost.METHODS)) <= {*MEASURED, *BASELINES}
    assert gast_cost._methods(" greats, dense,greats") == ["greats", "dense"]
    with pytest.raises(RecipeError, match="'twopass'; did you mean two-pass"):
        gast_cost._methods("dense,twopass")
    with pytest.raises(RecipeError, match="known: dense"):
        gast_cost._methods(",")


def test_a_run_from_the_command_line(work, tmp_path, capsys, monkeypatch):
    def fake(*args):
        return collect(*args, measuring=Machine())

    monkeypatch.setattr(gast_cost, "collect", fake)
    out = tmp_path / "cost.jsonl"
    words = ["--model", work.model, "--methods", "dense,greats", "--rounds", "2", "--length", "16", "--out", str(out)]
    assert gast_cost.main(words) == 0
    assert capsys.readouterr().out.startswith("| method | s/step |")
    assert [json.loads(line)["workload"]["length"] for line in out.read_text().splitlines()] == [16] * 4
    assert gast_cost.main(["--methods", "greets"]) == 2
    assert "did you mean greats" in capsys.readouterr().err
    assert gast_cost.main(["--model", work.model, "--rounds", "0"]) == 2
    assert gast_cost.main(["--model", work.model, "--length", "16", "--out", str(tmp_path / "no" / "folder")]) == 2
    assert "cannot be written" in capsys.readouterr().err
