"""`siftune bench`: what is measured, in which order, and what is said about it."""

import json
import subprocess
import sys

import pytest

from siftune.bench.cost import Measurement
from siftune.cli import bench as command
from siftune.cli.main import main

# method -> (seconds of its two steps, peak memory)
_COSTS = {
    "dense": ((2.0, 2.0), 3000.0),
    "rst": ((1.4, 1.6), 2400.0),
    "ist": ((1.0, 2.6), 2400.0),
    "gast-rest": ((2.0, 2.2), 3050.0),
    "trl": ((5.0, 3.0), 6000.0),
}


@pytest.fixture
def folder(tmp_path):
    """A folder that passes for a model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def worked(monkeypatch):
    """Put figures made up in the place of the processes; the tasks that they were asked for."""
    asked = []

    def measure(method, number, work, threads):
        asked.append((method, work, threads))
        facts = {"dtype": "bfloat16", "hardware": "an abacus", "versions": {"torch": "2.9", "trl": "1.5"}}
        seconds, memory = _COSTS[method]
        return Measurement(method, number, tuple((number + 1) * s for s in seconds), memory, facts)

    monkeypatch.setattr(command, "measure", measure)
    return asked


def bench(folder, *arguments):
    return main(["bench", "--model", str(folder), "--steps", "2", "--interval", "2", *arguments])


def test_a_folder_in_place_of_the_file_is_refused_before_anything_is_measured(folder, worked, tmp_path, capsys):
    assert bench(folder, "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"siftune: error: --out {tmp_path} is a folder: give a file in it\n"
    assert worked == []


def test_methods_take_turns_and_are_compared(folder, worked, capsys):
    assert bench(folder, "--against", "trl", "--rounds", "2", "--threads", "3", "--json") == 0
    ours = ["dense", "rst", "ist", "gast-rest"]
    assert [task for task, *_ in worked] == [*ours, "trl", *ours[1:], "trl", "dense"]
    assert {threads for *_, threads in worked} == {3}
    result = json.loads(capsys.readouterr().out)
    ist = result["methods"]["ist"]
    assert (ist["seconds_per_step"], ist["fastest"], ist["slowest"]) == pytest.approx((2.7, 1.8, 3.6))
    assert ist["seconds_ratio"] == pytest.approx({"dense": 0.9, "trl": 0.45})
    assert ist["memory_ratio"] == pytest.approx({"dense": 0.8, "trl": 0.4})
    assert result["workload"]["dtype"] == "bfloat16"
    assert (result["hardware"], result["versions"]["trl"]) == ("an abacus", "1.5")
    assert "measurements" not in result


def test_table_and_file(folder, worked, capsys):
    out = folder / "bench.json"
    assert bench(folder, "--methods", "dense,ist", "--against", "trl", "--rounds", "1", "--out", str(out)) == 0
    last = {"method": "trl", "round": 0, "seconds": [5.0, 3.0], "peak_memory_mb": 6000.0}
    assert json.loads(out.read_text())["measurements"][-1] == last
    said = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if line.strip()}
    assert rows["ist"] == ["1.8", "1.8–1.8", "0.90", "0.45", "2,400", "0.80", "0.40"]
    assert rows["trl"] == ["4", "4–4", "2.00", "1.00", "6,000", "2.00", "1.00"]
    assert "one round of 2 steps" in said.out
    assert "an abacus; torch 2.9, trl 1.5" in said.out
    assert "round 1 of 1: ist 1.8 s/step, peak 2,400 MB" in said.err


@pytest.mark.parametrize(("steps", "warned"), [("4", False), ("3", True)])
def test_a_window_with_more_or_less_scoring_than_its_share_is_warned_of(folder, worked, capsys, steps, warned):
    assert main(["bench", "--model", str(folder), "--steps", steps, "--interval", "2", "--rounds", "1"]) == 0
    assert ("no multiple of --interval" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "tlr"], "trl"),
        (["--active", "2"], "--active"),
        (["--out", "/nowhere/bench.json"], "/nowhere"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_measuring(folder, worked, capsys, arguments, words):
    assert bench(folder, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not worked


def test_the_waiting_process_stays_small():
    code = "import siftune.cli.bench, siftune.models.source, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
