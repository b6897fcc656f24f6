"""The examples run as printed, on a tiny model."""

import ast
import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.oracles import flat, gradients, sample_gradients
from support.seen import Seen
from support.tiny import tiny
from support.tiny_run import save_rows
from support.tokenizer import byte_tokenizer
from support.trainers import Watch, adapted, train, weights

import siftune
import siftune.offsite

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
METHODS = sorted((ROOT / "examples" / "methods").glob("*.py"))
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


# --- methods outside the package


@pytest.fixture
def method_file(monkeypatch):
    """Import a file of examples/methods, as a script beside it does."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "methods")
    return import_module


def changed(trainer):
    """Numbers of the layers that changed, step by step."""
    (watch,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, Watch)]
    return [{int(name.split(".layers.")[1].split(".")[0]) for name in names} for names in watch.changed]


def test_cut(method_file, tmp_path):
    method, choices = method_file("cut").Cut(), []
    method.on_select = choices.append
    _, trainer = train(tmp_path, method, max_steps=12)
    assert [set(choice.layers) for choice in choices] == changed(trainer)
    assert {choice.layers for choice in choices} == {tuple(range(lowest, 4)) for lowest in range(4)}


def test_lisa(method_file, tmp_path):
    method, choices = method_file("lisa").LISA(active=1, interval=3), []
    method.on_select = choices.append
    _, trainer = train(tmp_path, method, max_steps=9)
    assert [set(choice.layers) for choice in choices] == changed(trainer)
    layers = [choice.layers for choice in choices]
    assert [layers[start : start + 3] for start in (0, 3, 6)] == [[layers[start]] * 3 for start in (0, 3, 6)]
    assert len(set(layers)) > 1
    left = {name for name, p in trainer.model.named_parameters() if p in trainer.optimizer.state}
    assert left == {name for name in weights(trainer.model) if f".layers.{layers[-1][0]}." in name}


def test_greats(method_file, tmp_path):
    """A step of SGD follows the rows that the greedy loop chooses by gradients of single rows."""
    module, model, plain = method_file("greats"), adapted(), adapted()
    method, seen, rate = module.GREATS(2, keep=True), Seen(model), 5.0  # so high that the overlap decides
    train(tmp_path, method, model=model, max_steps=1, optim="sgd", learning_rate=rate, max_grad_norm=0.0)
    [choice], (support, inputs) = method.history, seen.all
    single, parameters = sample_gradients(plain, inputs), [p for p in plain.parameters() if p.requires_grad]
    g_BD = flat(single, parameters)
    h_D = torch.cat([grad.flatten() for grad in gradients(plain, support).values()]).double()
    torch.testing.assert_close(choice.scores[0].double(), g_BD @ h_D, rtol=1e-3, atol=1e-7)
    gains, chosen = g_BD @ h_D, []
    for _ in range(2):
        chosen.append(int(gains.argmax()))
        gains = gains - rate * 4 / 2 * (g_BD @ g_BD[chosen[-1]])  # η B/K
        gains[chosen] = -torch.inf
    assert choice.selected[0].tolist() == sorted(chosen) != (g_BD @ h_D).topk(2).indices.sort().values.tolist()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            expected = parameter.detach() - rate * single[parameter][chosen].sum(0) * 4 / 2
            torch.testing.assert_close(weights(model)[name], expected, rtol=1e-4, atol=1e-6)


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
    assert not [path.stem for path in METHODS if f'method_file("{path.stem}")' not in tested]
