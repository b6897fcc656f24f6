"""`siftune find-lr` from the command line: its output, its folder, and a second call."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from support.commands import error_of
from support.tiny_run import save_rows

from siftune.base.text import counted
from siftune.cli.main import main
from siftune.train import source as module

SETTINGS = """\
template: none
max_length: 64
rank: 2
batch_size: 4
steps: 3
save_every: 2
method: gast
gast:
  select: 2
"""


@pytest.fixture
def words(base, rows, tmp_path):
    """The arguments of a sweep that works."""
    (tmp_path / "recipe.yaml").write_text(SETTINGS)
    held_out = save_rows(tmp_path / "eval.jsonl", count=8)
    return [
        "find-lr", str(tmp_path / "recipe.yaml"), "--model", str(base), "--train", str(rows), "--eval", str(held_out),
        "--methods", "dense,gast", "--rates", "1e-3,1e-2", "--out", str(tmp_path / "sweep"),
    ]  # fmt: skip


def test_a_sweep(words, tmp_path, capsys):
    assert main(words) == 0
    captured = capsys.readouterr()
    assert f"4 runs to do, 0 done; results in {tmp_path}/sweep" in captured.err
    found = re.findall(
        r"^(\d)/4  (\w+) at (1e-\d), seed 0: held-out loss \d\.\d+, training loss \d\.\d+  \(\d+ s(, .+ left)?\)$",
        captured.err,
        re.MULTILINE,
    )
    cells = [("dense", "1e-3"), ("dense", "1e-2"), ("gast", "1e-3"), ("gast", "1e-2")]
    assert [(method, rate) for _, method, rate, _ in found] == cells
    assert [bool(left) for *_, left in found] == [True, True, True, False]
    table = captured.out.splitlines()
    assert table[1].split() == ["method", "1e-3", "1e-2"]
    assert [row.split()[0] for row in table[2:4]] == ["dense", "gast"]
    assert len(re.findall(r"^--method (dense|gast) --lr 1e-\d   held-out loss", captured.out, re.MULTILINE)) == 2
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "rates.json", "rates.md", "dense.yaml", "gast.yaml",
    }  # fmt: skip


def test_json_and_a_second_call(words, tmp_path, capsys, monkeypatch):
    assert main([*words, "--rates", "1e-2,1e30", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["folder"] == f"{tmp_path}/sweep"
    assert [run["diverged"] is None for run in first["runs"]] == [True, False, True, False]
    assert first["best"]["dense"]["flags"] == "--method dense --lr 1e-2"
    assert (first["best"]["gast"]["edge"], first["best"]["gast"]["extend"]) == ("lowest", [2.5e-3, 5e-3])
    monkeypatch.setattr(module, "load_model", None)
    assert main([*words, "--rates", "1e-2,1e30", "--json"]) == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert "0 runs to do, 4 done" in captured.err
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "dense,xyz"], "--methods"),
        (["--rates", "1e-3,0"], "--rates"),
        (["--eval", "None"], "no held-out rows"),
        (["--methods", "dense"], "gast.select is 2, which has no effect with method dense: leave it out"),
        (["--rate", "1e-3"], "unknown option --rate of `siftune find-lr`; did you mean --rates?"),
        (["--resume"], "a sweep resumes by itself"),
        (["--adapter", "full", "--rank", "None"], "adapter is full and no layers are given"),
        (["--lr", "-1"], "--lr is -1"),
    ],
)
def test_input_that_cannot_be_used(words, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(module, "load_model", None)
    assert error_of(capsys, *words, *flags).startswith(message)
    assert not (tmp_path / "sweep").exists()


def test_a_run_folder_is_left_alone(words, tmp_path, capsys):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "run.json").write_text("{}")
    assert "is not empty" in error_of(capsys, *words)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_sweep_that_is_ended_goes_on(words, tmp_path, capsys, name):
    many = [*words, "--methods", "gast", "--rates", "1e-3,2e-3,3e-3,4e-3,5e-3"]
    code = "import sys; from siftune.cli.main import main; sys.exit(main(sys.argv[1:]))"
    record = tmp_path / "sweep" / "rates.json"

    def finished():
        return json.loads(record.read_text())["state"].get("runs", []) if record.exists() else []

    process = subprocess.Popen([sys.executable, "-c", code, *many], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not finished():
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    _, log = process.communicate()
    done = len(finished())
    assert process.returncode == (130 if name == "SIGINT" else -9)
    assert 1 <= done < 5
    if name == "SIGINT":
        runs = counted(done, "finished run")
        assert f"interrupted; {runs} in {tmp_path}/sweep; the same command with --out" in log.splitlines()[-1]
    assert main(many) == 0
    assert f"{5 - done} runs to do, {done} done" in capsys.readouterr().err
    assert [run["lr"] for run in finished()] == [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
