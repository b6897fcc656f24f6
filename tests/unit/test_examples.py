"""The examples run as printed, on a tiny model."""

import ast
import re
import runpy
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


@pytest.fixture
def run_script(folder, monkeypatch, capsys):
    """Run a script of examples/ as a program in the folder; return its lines on standard output."""

    def run(name, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_ist_in_a_trainer(run_script):
    last = run_script("trainer_ist.py", "model", "rows.jsonl", "11")[-1]
    words, numbers = last.split(": ")
    assert words.startswith("layers by importance")
    assert sorted(ast.literal_eval(numbers)) == list(range(LAYERS))


def test_gast_in_trls_trainer(run_script):
    lines = run_script("sft_gast.py", "model", "rows.jsonl", "3")
    followed = [line for line in lines if "layer 0 followed rows" in line]
    assert len(followed) == 3
    for line in followed:
        assert len(ast.literal_eval(re.search(r"rows (\[.*?\])", line).group(1))) == 6  # three quarters of 8


@pytest.mark.parametrize("arguments", [(), ("model", "6")])
def test_a_plain_loop(run_script, arguments):
    lines = run_script("plain_loop.py", *arguments)
    losses = [float(re.search(r"loss (\S+)", line).group(1)) for line in lines if line.startswith("step ")]
    assert len(losses) == (int(arguments[1]) if arguments else 20)
    assert losses[-1] < losses[0]
    assert any(ast.literal_eval(lines[-1].removeprefix("importance: "))), "scored once at least"


def test_two_parties(run_script, folder):
    last = run_script("two_parties.py", "model", "rows.jsonl", "3")[-1]
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
