"""What the command tells of siftune's own tests is what their runs came to."""

import json
from pathlib import Path

from siftune.report import rows as module
from siftune.suspects.tested import figures, in_words

ROOT = Path(__file__).parents[3]
LINES = [
    {"model": "a", "cell": "near-15", "kind": "near", "planted": 0.15, "runs": 2, "rows": 40, "bad": 30},
    {"model": "b", "cell": "near-15", "kind": "near", "planted": 0.15, "runs": 1, "rows": 10, "bad": 0},
    {"model": "a", "cell": "duplicate-5", "kind": "duplicate", "planted": 0.05, "runs": 1, "rows": 0, "bad": 0},
]


def test_figures_are_added_up_over_models():
    near, copies = in_words(figures(json.dumps(LINES)))
    assert list(near.values()) == ["wrong answers, near misses", "15%", "3", "50", "60%"]
    assert copies["of these wrong"] == "–"


def test_without_figures_nothing_is_told(monkeypatch):
    monkeypatch.setattr(module, "figures", list)
    assert module.tests_table() == []


def test_the_package_tells_what_the_committed_runs_came_to():
    from lab.pays.results import read
    from lab.rows.report import tested as of_runs

    lines = read(ROOT / "lab" / "results" / "rows.jsonl")
    path = ROOT / "src" / "siftune" / "suspects" / "tested.json"
    assert path.is_file() == bool(lines)
    assert not lines or json.loads(path.read_text()) == of_runs(lines)
