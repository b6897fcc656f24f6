"""`adapter: full`: the weights of some layers themselves train, and what a run leaves behind."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.seen import assert_same
from support.tiny_run import choices_of, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.base.errors import AdapterError, InputError, LayerError, RecipeError
from siftune.cli.subjects import find_subject, load_subject
from siftune.data.read import load_rows
from siftune.data.tokens import tokenize_rows
from siftune.methods.options import RSTSettings
from siftune.models.load import load_model
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.train import source as module
from siftune.train.build import build
from siftune.train.folder.weights import About, put_in, read_about, read_tuned, save_tuned
from siftune.train.run import train

QUIET = Console(quiet=True)
IDS = torch.tensor([[5, 80, 91, 17, 200, 44]])
FULL = {"adapter": "full", "layers": (0, -1)}
METHODS = ("ist", "gast")


def weights(folder):
    return load_file(folder / "adapter" / "tuned_layers.safetensors")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def is_open(name):
    return name.startswith(("model.layers.0.", "model.layers.3."))


# --- what a run leaves behind


@pytest.mark.parametrize("method", METHODS)
def test_only_the_layers_change(base, rows, tmp_path, method):
    done = train(recipe(base, rows, tmp_path / "run", method=method, steps=4, warmup=0, **FULL), QUIET)
    choices = choices_of(tmp_path / "run")
    assert all(set(line["layers"]) <= {0, 3} for line in choices)
    drawn = {number for line in choices for number in line["layers"]} or {0, 3}
    before, after = AutoModelForCausalLM.from_pretrained(base).state_dict(), done.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if name.startswith(tuple(f"model.layers.{n}." for n in drawn))}
    assert_same(weights(tmp_path / "run"), {name: value for name, value in after.items() if is_open(name)})
    assert {n: p.requires_grad for n, p in done.model.named_parameters()} == {
        n: is_open(n) for n, _ in done.model.named_parameters()
    }
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in done.model.modules())
    if method == "ist":
        assert [line["step"] for line in choices if line["losses"]] == [2]


def test_the_folder_is_complete(base, rows, tmp_path):
    given = recipe(base, rows, tmp_path / "run", method="dense", save_every=3, **FULL)
    done = train(given, QUIET)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "rows.sha256", "run.json", "metrics.jsonl", "adapter", "checkpoints",
        "README.md",
    }  # fmt: skip
    assert load_recipe(folder / "recipe.yaml") == resolve_recipe(given)
    about = json.loads((folder / "adapter" / "tuned_layers.json").read_text())
    assert about == {"base": str(base), "layers": [0, 3]}
    assert AutoTokenizer.from_pretrained(folder / "adapter")("a?").input_ids
    card = (folder / "README.md").read_text()
    assert card == (folder / "adapter" / "README.md").read_text()
    assert "all weights of the layers 0, -1." in card
    names: dict = {}
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace(repr(base.name), repr(str(base))).replace("'adapter'", repr(str(folder / "adapter")))
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(done.model))
    # a checkpoint holds no frozen weight
    kept = load_file(folder / "checkpoints" / "checkpoint-3" / "tuned_layers.safetensors")
    assert set(kept) == set(weights(folder))
    assert not list((folder / "checkpoints" / "checkpoint-3").glob("model*"))


def test_half_precision(base, rows, tmp_path):
    """Products in bfloat16, weights and checkpoints in float32, the result as the model has it."""
    seen = set()
    settings = {"dtype": "bfloat16", "method": "dense", "steps": 2, "save_every": 2, **FULL}
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda part, args, out: seen.add(out.dtype) if isinstance(part, torch.nn.Linear) else None
    )
    try:
        done = train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    finally:
        hook.remove()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "tuned_layers.safetensors")
    assert {value.dtype for value in checkpoint.values()} == {torch.float32}
    assert_same(weights(tmp_path / "run"), {name: value.bfloat16() for name, value in checkpoint.items()})
    assert any(not torch.equal(value, value.bfloat16().float()) for value in checkpoint.values())
    assert float((logits(done.model) - logits(load_model(str(base), "bfloat16")[0])).abs().max()) > 1e-2


# --- in memory


def test_build_on_a_model_in_memory(base, rows, tmp_path):
    model, tokenizer = load_model(str(base), "bfloat16")
    data = {"train": tokenize_rows(load_rows(str(rows)), tokenizer, 64, "none")}
    given = resolve_recipe(recipe(base, rows, tmp_path / "run", steps=2, **FULL))
    built = build(given, model, tokenizer, data, tmp_path / "run")
    built.trainer.train()
    built.release()
    assert built.trainer.model is model
    train(recipe(base, rows, tmp_path / "other", steps=2, dtype="bfloat16", **FULL), QUIET)
    state = model.state_dict()
    assert_same(weights(tmp_path / "other"), {name: value for name, value in state.items() if is_open(name)})
    logits(model)  # of use as it is
    with pytest.raises(RecipeError, match="no layers are given"):
        build(Recipe(method="dense", adapter="full"), model, tokenizer, data, tmp_path / "run")


def test_rst_on_complete_layers(base, rows, tmp_path):
    """All layers are open, and those that were drawn have changed."""
    given = recipe(base, rows, tmp_path / "run", method="rst", adapter="full", steps=2, warmup=0)
    done = train(replace(given, layers=None, rst=RSTSettings(active=0.25)), QUIET)
    assert "Trained: all weights of all layers." in (tmp_path / "run" / "README.md").read_text()
    trained = {line["step"]: line["layers"] for line in choices_of(tmp_path / "run")}
    before, after = load_model(str(base), "float32")[0].state_dict(), weights(tmp_path / "run")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    drawn = {layer for layers in trained.values() for layer in layers}
    assert len(drawn) < 4
    assert changed == {name for name in after if name.startswith(tuple(f"model.layers.{n}." for n in drawn))}
    assert torch.equal(logits(done.model), logits(load_subject(find_subject(str(tmp_path / "run")))[0]))


# --- what is refused


def test_training_all_weights_is_refused_before_anything_is_loaded(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_model", None)
    with pytest.raises(RecipeError, match=r"adapter is full .*--layers, such as 0 1"):
        train(recipe(base, rows, tmp_path / "run", method="dense", adapter="full"), QUIET)


def test_a_layer_that_is_not_there(base, rows, tmp_path):
    for kind in ("full", "lora"):
        with pytest.raises(LayerError, match="the model has 4 layers"):
            train(recipe(base, rows, tmp_path / "run", adapter=kind, layers=(4,)), QUIET)


# --- the folder of tuned layers


@pytest.fixture
def saved(tmp_path):
    save_tuned(tmp_path / "x", About("base", (0, 3)), {"a.weight": torch.ones(2, 3), "b": torch.zeros(2)})
    return tmp_path / "x"


def test_tuned_layers_round_trip(saved):
    assert read_about(saved) == About("base", (0, 3))
    assert_same(read_tuned(saved), {"a.weight": torch.ones(2, 3), "b": torch.zeros(2)})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base": 1, "layers": [0]}', '{"base": "b", "layers": [true]}'])
def test_a_damaged_description(saved, text):
    (saved / "tuned_layers.json").write_text(text)
    with pytest.raises(InputError, match=r"tuned_layers\.json cannot be read"):
        read_about(saved)


def test_damaged_weights(saved):
    path = saved / "tuned_layers.safetensors"
    save_file({"a": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(AdapterError, match=r"tuned_layers\.safetensors: a holds NaN or infinity"):
        read_tuned(saved)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(AdapterError, match=r"tuned_layers\.safetensors cannot be read"):
        read_tuned(saved)
    path.unlink()
    with pytest.raises(AdapterError, match=r"tuned_layers\.safetensors cannot be read"):
        read_tuned(saved)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("weights", (2, 3), "the model has nothing there"), ("weight", (1,), r"the model has shape \(2, 3\) there")],
)
def test_tensors_that_do_not_fit_change_nothing(name, shape, message):
    model = torch.nn.Linear(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        put_in(model, {"bias": torch.ones(2), name: torch.ones(shape)}, "x")
    assert_same(model.state_dict(), before)
