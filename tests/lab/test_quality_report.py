"""The tables of quality.py: what is compared with what."""

import pytest

from lab import quality
from lab.quality_report import report


def run(method, seed, right, nats):
    job = {"task": "arithmetic", "method": method, "seed": seed, "overrides": {}, "settings": {"lr": 5e-4}}
    return {"job": job, "correct": {"exact_match": right}, "nll": nats}


LINES = [
    run("dense", 0, [1, 1, 1, 1], [1.0] * 4),
    run("twelve", 0, [1, 1, 0, 0], [2.0] * 4),
    run("eight", 0, [1, 0, 0, 0], [2.5] * 4),
]


def cells(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_methods_are_compared_with_those_that_are_named():
    assert "− twelve" not in cells(report(LINES))["eight"]
    found = cells(report(LINES, against=["twelve"]))
    assert found["eight"]["− dense"].startswith("-75.0 [")
    assert found["eight"]["− twelve"].startswith("-25.0 [")
    assert found["eight"]["NLL − twelve"] == "+0.500 [+0.500, +0.500]"
    assert found["dense"]["− twelve"].startswith("+50.0 [")
    assert found["twelve"]["− twelve"] == "–"


def test_a_name_that_was_not_run_is_refused(tmp_path):
    file = tmp_path / "quality.jsonl"
    file.write_text('{"job": {"method": "dense"}}\n')
    with pytest.raises(SystemExit, match=r"no run of .* is called 'danse'; there are dense"):
        quality.main(["--report", str(file), "--against", "danse"])


def test_options_want_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="give its folder with --data"):
        quality.main(["--task", "options", "--methods", "dense", "--out", str(tmp_path / "out.jsonl")])
