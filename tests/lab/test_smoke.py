"""Every script of the laboratory: its help, and a run in seconds on a tiny random model (marker lab)."""

import ast
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.lab_jobs import pays_job

from lab import tables
from lab.lines import read
from lab.random_llama import save_llama
from siftune.methods.dp.secret import Secret

ROOT = Path(__file__).parents[2]
JOBS = {"lab.avoid.job", "lab.keep.job", "lab.pays.job", "lab.rows.job"}  # no command line of their own
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "lab").rglob("*.py")
    if "__name__ == " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - JOBS))
def test_help(script, capsys):
    if script == "lab.chart":
        pytest.importorskip("matplotlib", reason="matplotlib is in siftune[lab]")
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_readme_names_every_script():
    text = (ROOT / "lab" / "README.md").read_text(encoding="utf-8")
    missing = [script for script in SCRIPTS if script not in text and script not in JOBS]
    assert not missing


def test_lab_uses_public_names():
    for path in (ROOT / "lab").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "siftune"]
        names = {alias.asname or alias.name for node in imports for alias in node.names}
        assert not [name for name in names if name.startswith("_")], path
        used = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
        assert not [
            n.attr for n in used if n.value.id in names and n.attr.startswith("_") and not n.attr.startswith("__")
        ], path


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "llama", 6, 32, 128)


WORDS = [
    "dense", "kl", "half=kl,rows:prompts,loss:ce", "public=kl,rows:public,weight:2", "asft", "ewc", "fisher+kl", "oft",
]  # fmt: skip


@pytest.mark.lab
@pytest.mark.parametrize("words", WORDS)
def test_keep_jobs(words, base, suite, small_pools, tmp_path, monkeypatch):
    from lab.keep import job, report
    from lab.keep.run import method_of

    for name, value in {"_OTHERS": 4, "_TEXTS": 8, "_LENGTH": 40}.items():
        monkeypatch.setattr(job, name, value)
    plain = {**pays_job(base), "method": method_of(words)}
    plain["method"]["recipe"] = {"max_length": 128}
    lines = [
        {"job": {**plain, **changes}, **job.run_job({**plain, **changes}, suite, tmp_path)}
        for changes in ({}, {"method": {"name": "dense", "scales": True}})
    ]
    assert len(lines[0].get("layers", [])) == (2 if words.startswith("fisher") else 0)
    table = report.report(lines)
    assert words.partition("=")[0] in table
    assert "adapter × 0.5" in table


@pytest.mark.lab
def test_rows_job(base, suite, tmp_path, monkeypatch):
    from lab.rows import report
    from lab.rows.job import scored

    monkeypatch.setattr("siftune.suspects.scoring.FEWEST", 2)
    cell = {"name": "mixed-50", "rows": 46, "known": 0}
    job = {"cell": cell, "model": base, "seed": 0, "batch": 4, "lr": 1e-2, "epochs": 1, "method": {"name": "rows"}}
    line = {"job": job, **scored(job, suite, tmp_path)}
    assert (line["rows"], len(line["wrong"])) == (46, 10)
    assert [len(values) for values in (line["tokens"], line["trained_on"], *line["losses"].values())] == [46] * 6
    assert "| mixed-50 |" in report.report([line])


@pytest.mark.lab
def test_scores_of_a_pool(base, suite, tmp_path, monkeypatch):
    from lab.pays import scores

    monkeypatch.chdir(tmp_path)
    job = {**pays_job(base), "batch": 4}
    line = scores.compare(job, suite)
    assert line["rows"] == 12
    assert line["auc"].keys() == {*scores.SCORES}
    assert 0 < line["auc"]["K"] < 1
    assert line["auc"]["siftune sift"] is not None
    assert 0 < line["selected"] <= line["rows"]
    assert f"| {job['cell']['name']} |" in scores.report([{"job": job, **line}])


SMALL = ["--batch-size", "2", "--length", "16", "--steps", "1", "--warmup", "1", "--rounds", "1", "--threads", "1"]


@pytest.fixture
def in_process(monkeypatch):
    """Run the workers of cost measurements in this process."""

    def run(command, **_):
        code = importlib.import_module(command[2]).main(command[3:])
        return SimpleNamespace(returncode=code, stderr="")

    monkeypatch.setattr("siftune.bench.cost.subprocess.run", run)
    monkeypatch.setattr("siftune.methods.dp.callback.Secret", Secret)  # dp_cost replaces it


@pytest.mark.lab
@pytest.mark.distributed
def test_worker_process(llama, capsys):
    from lab import gast_cost

    assert gast_cost.main([*SMALL, "--model", llama, "--methods", "dense"]) == 0
    assert "| dense |" in capsys.readouterr().out


@pytest.mark.lab
@pytest.mark.parametrize(("script", "methods"), [
    ("gast_cost", "dense,gast-sample,two-pass-sample,store-all"),
    ("dp_cost", "dense,dense-drawn,dp-flat,opacus,opacus-ghost"),
])  # fmt: skip
def test_costs(in_process, script, methods, llama, tmp_path, capsys):
    module, out = importlib.import_module(f"lab.{script}"), tmp_path / "cost.jsonl"
    words = [*SMALL, "--model", llama, "--dtype", "float32", "--methods", methods, "--out", str(out)]
    assert module.main(words) == 0
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in methods.split(","))
    before = out.read_text()
    assert module.main(words) == 0  # nothing is measured again
    assert out.read_text() == before
    assert "×" in tables._costs(out)


@pytest.mark.lab
def test_offsite(llama, suite, tmp_path, capsys):
    from lab import offsite

    out, texts = (
        tmp_path / "out.jsonl",
        f"--calibration {suite}/ARC-Easy.train.json --text {suite}/openbookqa.test.json",
    )
    words = f"--model {llama} {texts} --rows 8 --text-rows 4 --length 64 --keeps 0.5 --steps 2 --batch 4 --questions 4"
    words = f"{words} --threads 1 --out {out} --outer 1 --lrs 2e-4,1e-3 --methods".split()
    assert offsite.main([*words, "layerdrop", "mine=basis:svd,mlp:channels"]) == 0
    assert offsite.main(["--report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| mine, lr 0.0002 |" in printed
    assert printed.count("Base: lr ") == 2
    *_, base, _, mine = [json.loads(line)["scores"] for line in out.read_text().splitlines()]
    assert len({base["full_zs"]["nll"], base["full_ft"]["nll"], mine["plug_in"]["nll"]}) == 3


def test_offsite_pools_no_runs_of_different_settings():
    from lab import offsite

    text = {"overall": 0.9, "loss_emulator": 5.0, "loss_full": 4.9}
    job = {"name": "one", "keep": 0.7, "rows": 32, "seed": 0, "tune": None, "emulator": {"keep": 0.7}}
    lines = [{"job": {**job, **change}, "text": text, "scores": {}} for change in ({}, {"seed": 1}, {"rows": 256})]
    assert "| one |" in offsite.report(lines[:2])
    with pytest.raises(SystemExit, match="“one” names emulators with different rows"):
        offsite.report(lines)


@pytest.mark.lab
def test_offsite_on_own_texts(llama, suite, tmp_path, monkeypatch):
    from lab import offsite

    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    words = ["--calibration", str(suite / "ARC-Easy.train.json"), "--text", str(suite / "openbookqa.test.json")]
    words += ["--model", llama, "--rows", "8", "--text-rows", "4", "--keeps", "0.5", "--tune", "none", "--methods"]
    for source in ("rows", "free", "prompted", "mixed"):
        more = [f"{source}=", "--source", source, "--threads", "1", "--out", str(tmp_path / "out.jsonl")]
        assert offsite.main([*words, *more]) == 0
    found = read(tmp_path / "out.jsonl")
    assert [line["job"].get("source", "rows") for line in found] == ["rows", "free", "prompted", "mixed"]
    assert len({line["text"]["loss_emulator"] for line in found}) == 4


@pytest.mark.lab
def test_lira_epsilon(tmp_path, capsys):
    from lab import lira_epsilon

    out = str(tmp_path / "out.jsonl")
    words = ["--epsilons", "8", "--models", "4", "--rows", "24", "--steps", "2", "--batch", "6", "--rank", "2"]
    assert lira_epsilon.main([*words, "--out", out]) == 0
    assert lira_epsilon.main(["--report", out]) == 0
    assert "| 8 |" in capsys.readouterr().out


@pytest.mark.lab
@pytest.mark.parametrize("name", [name for name in tables.TABLES if not name.startswith("pays")])
def test_committed_tables_are_those_of_the_results(name):
    assert tables.main(["--check", Path(name).stem]) == 0


@pytest.mark.lab
def test_chart(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in siftune[lab]")
    from lab import chart

    chart.main(["--out", str(tmp_path / "chart.svg")])
    assert "<svg" in (tmp_path / "chart.svg").read_text()
