"""The examples run as printed, on a tiny model."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import tiny
from support.tiny_run import save_rows
from support.tokenizer import byte_tokenizer

import siftune
import siftune.offsite

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAYERS = 6  # two parties need a middle between the two outer layers at either end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model and rows in it, where scripts run."""
    path = tmp_path_factory.mktemp("examples")
    tokenizer = byte_tokenizer()
    tiny("llama", LAYERS, vocab_size=300, eos_token_id=tokenizer.eos_token_id).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    save_rows(path / "rows.jsonl")
    return path


def run_script(script, folder, *arguments):
    """Run a script in a process of its own; return its lines on standard output."""
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ist_in_a_trainer(folder):
    last = run_script(ROOT / "examples" / "trainer_ist.py", folder, "model", "rows.jsonl", "11")[-1]
    words, numbers = last.split(": ")
    assert words.startswith("layers by importance")
    assert sorted(ast.literal_eval(numbers)) == list(range(LAYERS))


def test_gast_in_trls_trainer(folder):
    lines = run_script(ROOT / "examples" / "sft_gast.py", folder, "model", "rows.jsonl", "3")
    followed = [line for line in lines if "layer 0 followed rows" in line]
    assert len(followed) == 3
    for line in followed:
        assert len(ast.literal_eval(re.search(r"rows (\[.*?\])", line).group(1))) == 6  # three quarters of 8


@pytest.mark.parametrize("arguments", [(), ("model", "6")])
def test_a_plain_loop(folder, arguments):
    lines = run_script(ROOT / "examples" / "plain_loop.py", folder, *arguments)
    losses = [float(re.search(r"loss (\S+)", line).group(1)) for line in lines if line.startswith("step ")]
    assert len(losses) == (int(arguments[1]) if arguments else 20)
    assert losses[-1] < losses[0]
    assert any(ast.literal_eval(lines[-1].removeprefix("importance: "))), "scored once at least"


def test_two_parties(folder):
    last = run_script(ROOT / "examples" / "two_parties.py", folder, "model", "rows.jsonl", "3")[-1]
    assert re.fullmatch(r"(first|last)\.[01]\.\S+ moved most, by \d+\.\d\d% of its norm", last)
    assert (folder / "runs/two_parties/kit/manifest.json").is_file()
    assert (folder / "runs/two_parties/tuned/model.safetensors").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_use_public_names_alone(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    public = {"siftune": siftune.__all__, "siftune.offsite": siftune.offsite.__all__}
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in modules if name.partition(".")[0] == "siftune"]
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "siftune":
            assert {alias.name for alias in node.names} <= set(public[node.module])


def test_every_example_is_run_here():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert EXAMPLES
    assert not [path.name for path in EXAMPLES if path.name not in tested]
