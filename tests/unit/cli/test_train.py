"""`siftune train` from the command line: a whole run, and every way in which input can be wrong."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.commands import error_of
from support.tiny import tiny
from support.tiny_run import choices_of, save_rows
from support.tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

from siftune.cli.main import main
from siftune.train.results import Results

SETTINGS = """\
template: none
max_length: 64
rank: 2
batch_size: 4
steps: 6
method: ist
ist: {interval: 2, score_batch_size: 4, active: 0.5}
lr: 0.01
log_every: 1
"""


@pytest.fixture
def words(base, rows, tmp_path):
    """The arguments of a run that works."""
    path = tmp_path / "recipe.yaml"
    path.write_text(SETTINGS)
    return ["train", str(path), "--model", str(base), "--train", str(rows), "--out", str(tmp_path / "run")]


def loads(base, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 80, 91]])).logits).all()
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_a_run(words, base, tmp_path, capsys):
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["run"], result["adapter"]) == (f"{tmp_path}/run", f"{tmp_path}/run/adapter")
    assert result["steps"] == 6
    assert f"next: `siftune eval {tmp_path}/run --data FILE`, `siftune report {tmp_path}/run`, " in captured.err
    assert len(re.findall(r"^step \d/6  loss ", captured.err, re.MULTILINE)) == 6
    assert loads(base, result["adapter"])


def test_what_it_came_to_is_told(words, rows, capsys):
    assert main([*words, "--eval", str(rows), "--eval-every", "3", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    done = re.search(r"done: 6 steps in \d+ s, loss (\S+) to (\S+), held-out loss (\S+), peak [\d,]+ MB", captured.err)
    assert done is not None, captured.err
    assert done.groups() == tuple(f"{result[name]:.4f}" for name in ("loss_first", "loss_last", "eval_loss"))
    assert re.search(r"^step 3/6  held-out loss \d+\.\d{4}$", captured.err, re.MULTILINE)
    assert f"step 6/6  held-out loss {result['eval_loss']:.4f}\n" in captured.err
    assert f"{rows}: 24 rows\n" in captured.err


@pytest.mark.parametrize(
    ("changes", "warned"),
    [({"loss_last": 1.5}, True), ({"loss_last": 1.49}, False), ({"loss_last": 1.5, "kept_step": 3}, False)],
)
def test_a_loss_that_rises_is_reported(words, capsys, monkeypatch, changes, warned):
    summary_of = Results.summary
    monkeypatch.setattr(
        Results, "summary", lambda self, seconds: {**summary_of(self, seconds), "loss_first": 0.5, **changes}
    )
    assert main([*words, "--lr", "1e-3"]) == 0
    errors = capsys.readouterr().err
    advice = "unless the last rows are harder than the first, lower --lr, now 0.001"
    assert (f"siftune: the loss rose from 0.50 to 1.50: {advice}" in errors) == warned
    assert ("the loss rose" in errors) == warned


def test_the_recipe_of_a_run_gives_the_run_again(words, base, tmp_path):
    assert main(words) == 0
    recipe = str(tmp_path / "run" / "recipe.yaml")
    assert main(["train", recipe, "--out", str(tmp_path / "again")]) == 0
    first, again = (loads(base, tmp_path / name / "adapter") for name in ("run", "again"))
    assert all(torch.equal(again[name], value) for name, value in first.items())


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--steps", "1"),
        ("train", "--steps", "1", "--dry-run"),
        ("find-lr", "--steps", "1", "--eval", "FEW", "--methods", "dense"),
        ("sift", "--target", "FEW"),
    ],
)
def test_rows_that_are_longer_than_the_window_are_refused(tmp_path, capsys, command):
    model, few = tmp_path / "base", save_rows(tmp_path / "few.jsonl", 12)
    tiny("gpt2", vocab_size=300).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    path = tmp_path / "long.jsonl"
    path.write_text(GOOD * 20 + json.dumps({"prompt": "a", "completion": "x" * 200}) + "\n")
    given = ["--model", model, "--train", path, "--template", "none", "--out", tmp_path / "out"]
    found = error_of(capsys, *(few if word == "FEW" else word for word in command), *given, "--max-length", "150")
    assert "takes 150 tokens, but the model's window is 64" in found


def test_what_was_followed_is_named_by_source_where_rows_have_one():
    from siftune.cli.train import _followed

    assert _followed({}) == ""
    assert _followed({"other": 0.75}) == "followed: 75% of the rows seen\n"
    assert _followed({"other": 0.5, "web": 1.0}) == "share of rows followed: other 50%, web 100%\n"


def test_nothing_in_rows_reaches_the_terminal_as_a_command(base, tmp_path, capsys):
    path, attack = tmp_path / "attack.jsonl", "\x1b]0;title\x07\x1b[2J"
    rows = [{"prompt": f"{i}?", "completion": str(i), "source": f"{attack}{i % 2}"} for i in range(8)]
    bad = [{"prompt": "?", "completion": "x", "weight": attack}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]))
    given = ["--train", str(path), "--bad-rows", "drop", "--method", "gast", "--gast.support", "rest", "--steps", "2"]
    given += ["--model", str(base), "--template", "none", "--rank", "2", "--batch-size", "4"]
    capsys.readouterr()
    assert main(["train", *given, "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr()
    assert "share of rows followed: \\x1b]0;title" in told.err
    assert "1 row left out" in told.err
    assert "\x1b" not in told.err + told.out


def test_a_held_out_loss_of_an_earlier_step_is_named_so(words, rows, tmp_path, capsys):
    assert main([*words, "--eval", str(rows)]) == 0
    assert re.search(r"held-out loss \d\.\d{4}, peak", capsys.readouterr().err)
    assert main([*words, "--resume", "--steps", "8"]) == 0
    assert re.search(r"held-out loss \d\.\d{4} after step 6, peak", capsys.readouterr().err)
    assert re.search(r"held-out loss \| \d\.\d{4}, after step 6 ", (tmp_path / "run" / "README.md").read_text())


@pytest.mark.parametrize(("adapter", "exported"), [("lora", True), ("full --layers 0", True), ("series", False)])
def test_export_is_a_next_step_of_what_it_can_merge(base, rows, tmp_path, capsys, adapter, exported):
    words = ["--train", str(rows), "--model", str(base), "--template", "none", "--steps", "2"]
    capsys.readouterr()
    assert main(["train", *words, "--adapter", *adapter.split(), "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().err
    assert "`siftune ask " in told
    assert ("`siftune export " in told) == exported


def test_what_a_run_says_has_no_advice_of_other_libraries(words, tmp_path, capfd):
    import logging

    assert main(words) == 0
    assert main([*words, "--steps", "8", "--resume"]) == 0
    said = capfd.readouterr().err
    assert "trainer_state.json" not in said
    assert "mtime" not in said
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.NOTSET


# --- a limit on the size of files ---


def limited(kilobytes, words):
    """The sentence of a command that fails by a limit on the size of files."""
    code = (
        "import resource, sys; from siftune.cli.main import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1024},) * 2); sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_limit_on_the_size_of_files_leaves_the_checkpoint_whole(words, base, tmp_path):
    """As a full disk or a quota does, it lets a write fail in the middle."""
    out = tmp_path / "run"
    assert main([*words, "--save-every", "2", "--schedule", "constant", "--steps", "2"]) == 0
    checkpoint = {p.name: p.read_bytes() for p in (out / "checkpoints" / "checkpoint-2").iterdir()}
    resumed = [*words, "--save-every", "2", "--schedule", "constant", "--resume"]
    last = limited(6, resumed)
    assert re.search("cannot be written |File too large|the disk is full", last), last
    assert {p.name: p.read_bytes() for p in (out / "checkpoints" / "checkpoint-2").iterdir()} == checkpoint
    assert main(resumed) == 0
    assert [line["step"] for line in choices_of(out)] == list(range(6))


# --- signals ---


def test_sigterm(words, base, tmp_path):
    code = "import sys; from siftune.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--steps", "100000"], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    said = (
        rf"siftune: interrupted; the adapter after step (\d+) is in {tmp_path}/run/adapter, and `siftune train --resume"
    )
    last = re.match(said, err.splitlines()[-1])
    assert last, err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["summary"]["steps"]) == ("interrupted", int(last[1]))
    assert any(value.any() for name, value in loads(base, tmp_path / "run" / "adapter").items() if "lora_B" in name)
