"""A run continues with a trained adapter, and a quantised base trains."""

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from support.tiny import tiny
from support.tiny_run import recipe, save_rows
from support.tokenizer import byte_tokenizer
from support.trainers import weights
from transformers import AutoModelForCausalLM

from siftune.base.errors import AdapterError, ModelError, RecipeError
from siftune.models.load import load_model
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.train.build import trainable
from siftune.train.folder.weights import adopted
from siftune.train.run import train

QUIET = Console(quiet=True)
IDS = torch.tensor([[5, 80, 91, 17, 200, 44]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


# an adapter that was trained before


@pytest.fixture(scope="module")
def earlier(base, tmp_path_factory):
    """The folder of a run of one step."""
    place = tmp_path_factory.mktemp("earlier")
    rows = save_rows(place / "rows.jsonl")
    return train(recipe(base, rows, place / "run", method="dense", steps=1), QUIET).folder.path


def test_a_run_goes_on_with_the_adapter_of_another(base, rows, tmp_path):
    first = train(recipe(base, rows, tmp_path / "first", method="dense", rank=3, alpha=9), QUIET)
    given = recipe(
        base, rows, tmp_path / "second", method="dense", rank=None, from_adapter=str(first.folder.path), lr=1e-9
    )
    second = train(given, QUIET)
    torch.testing.assert_close(logits(second.model), logits(first.model))
    kept = load_recipe(second.folder.path / "recipe.yaml")
    assert (kept.rank, kept.alpha, kept.adapter) == (3, 9, "lora")
    assert all(p.requires_grad == ("lora" in name) for name, p in second.model.named_parameters())
    third = train(
        recipe(base, rows, tmp_path / "third", method="ist", rank=3, from_adapter=str(first.folder.adapter)), QUIET
    )
    assert any(not torch.equal(v, weights(first.model)[n]) for n, v in weights(third.model).items())


def test_a_run_on_an_adapter_goes_on_by_the_command_that_began_it(base, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(recipe(base, rows, tmp_path / "first", method="dense", steps=1), QUIET)
    given = {"method": "dense", "from_adapter": "first", "save_every": 2}
    train(recipe(base, rows, tmp_path / "run", **given | {"steps": 2}), QUIET)
    again = recipe(base, rows, tmp_path / "run", **given | {"steps": 4, "resume": True, "lr": 1e-2})
    assert train(again, QUIET).summary["steps"] == 4
    train(recipe(base, rows, tmp_path / "other", method="dense", steps=1), QUIET)
    other = recipe(base, rows, tmp_path / "run", **given | {"from_adapter": "other", "steps": 6, "resume": True})
    with pytest.raises(RecipeError, match="from_adapter"):
        train(other, QUIET)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"rank": 5}, "rank is 5, but .* has 2"), ({"alpha": 5}, "alpha is 5"), ({"adapter": "dora"}, "dora")],
)  # fmt: skip
def test_an_adapter_of_another_form_is_refused_by_name(base, rows, tmp_path, earlier, settings, words):
    with pytest.raises(RecipeError, match=words):
        train(recipe(base, rows, tmp_path / "run", from_adapter=str(earlier), **settings), QUIET)


def test_an_earlier_adapter_has_its_own_dropout_and_limits(base, rows, tmp_path):
    given = {"method": "dense", "adapter": "dora", "dropout": 0.25, "alpha": 6, "steps": 1}
    first = train(recipe(base, rows, tmp_path / "first", **given), QUIET)
    path = first.folder.adapter / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6,', '"lora_alpha": 6.0,'))  # as other tools write it
    bare = tmp_path / "bare"
    shutil.copytree(first.folder.adapter, bare)
    (bare / path.name).write_text(path.read_text().replace('"lora_dropout": 0.25,', ""))
    assert adopted(Recipe(from_adapter=str(bare))).dropout == 0.0
    again = {"method": "dense", "rank": None, "from_adapter": str(first.folder.path), "steps": 1}
    second = train(recipe(base, rows, tmp_path / "second", **again), QUIET)
    kept = load_recipe(second.folder.path / "recipe.yaml")
    assert (kept.dropout, kept.alpha) == (0.25, 6)
    for refused, words in (
        ({"dropout": 0.5}, "dropout is 0.5, but .* has 0.25"),
        ({"compile": True}, "compile goes with"),
    ):
        with pytest.raises(RecipeError, match=words):
            train(recipe(base, rows, tmp_path / "third", **again, **refused), QUIET)


def test_norms_of_an_earlier_run_do_not_train_in_half_precision(base, rows, tmp_path):
    given = {"method": "dense", "rank": None, "steps": 1}
    first = train(recipe(base, rows, tmp_path / "first", adapter="ln", **given), QUIET)
    with pytest.raises(AdapterError, match=r"layernorm.*weight would train in torch\.bfloat16"):
        train(
            recipe(base, rows, tmp_path / "run", from_adapter=str(first.folder.path), dtype="bfloat16", **given), QUIET
        )


def test_an_earlier_adapter_that_a_quantised_base_cannot_have_is_refused(base, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    first = train(recipe(base, rows, tmp_path / "first", method="dense", adapter="dora", steps=1), QUIET)
    given = {"method": "dense", "rank": None, "from_adapter": str(first.folder.path), "quantize": "8bit"}
    with pytest.raises(AdapterError, match="dora"):
        train(recipe(base, rows, tmp_path / "second", **given), QUIET)


def test_a_run_on_experts_is_not_resumed_without_them(rows, tmp_path):
    place, tokenizer = tmp_path / "mixtral", byte_tokenizer()
    tiny("mixtral", 2, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(place)
    tokenizer.save_pretrained(place)
    given = {"method": "dense", "steps": 2, "save_every": 2}
    first = train(recipe(place, rows, tmp_path / "run", targets=("q_proj", "experts"), **given), QUIET)
    trained = (first.folder.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=r"target_parameters = .*targets"):
        train(recipe(place, rows, tmp_path / "run", targets=("q_proj",), resume=True, **given | {"steps": 4}), QUIET)
    assert (first.folder.adapter / "adapter_model.safetensors").read_bytes() == trained


def test_what_is_no_adapter_is_refused(base, rows, tmp_path):
    with pytest.raises(AdapterError, match="no adapter_config"):
        train(recipe(base, rows, tmp_path / "run", from_adapter=str(tmp_path)), QUIET)
    layers = train(recipe(base, rows, tmp_path / "full", adapter="full", method="dense", layers=(0,), steps=1), QUIET)
    with pytest.raises(AdapterError, match="tuned layers"):
        train(recipe(base, rows, tmp_path / "run", from_adapter=str(layers.folder.path)), QUIET)


# what the Trainer and transformers are told


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is for Linux")
@pytest.mark.parametrize(("kind", "method"), [("4bit", "ist"), ("8bit", "gast")])
def test_a_quantised_base_trains_and_its_adapter_fits_the_plain_one(rows, tmp_path, kind, method):
    base, tokenizer = tmp_path / "base", byte_tokenizer()
    # bitsandbytes rounds 64 values together
    blocks = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
    tiny("llama", 2, vocab_size=300, eos_token_id=tokenizer.eos_token_id, **blocks).save_pretrained(base)
    tokenizer.save_pretrained(base)
    done = train(recipe(base, rows, tmp_path / "run", quantize=kind, method=method, steps=3), QUIET)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), done.folder.adapter)
    assert any(float(v.abs().max()) > 0 for n, v in weights(done.model).items() if "lora_B" in n)
    near = logits(again) - logits(done.model)
    assert float(near.abs().mean()) < 0.5 * float(logits(again).abs().mean())
    assert any(
        type(m).__name__.startswith("Linear") and "bitsandbytes" in type(m).__module__ for m in done.model.modules()
    )
    values = sum(value.numel() for value in weights(done.model).values())
    plain = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert trainable(SimpleNamespace(trainer=SimpleNamespace(model=done.model))) == (values, plain + values)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is for Linux")
def test_gradients_go_through_4_bit_weights_after_a_pass_in_eval_mode(base, monkeypatch):
    """bitsandbytes would pack them for inference then, on processors with AVX-512 for bfloat16."""
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model, _ = load_model(str(base), quantize="4bit")
    first = gradient(model.train())
    with torch.no_grad():
        model.eval()(torch.arange(7)[None])
    assert torch.equal(gradient(model.train()), first)
    assert float(first.abs().max()) > 0


def gradient(model):
    """Of the first layer's norm, to which gradients come through all layers' matrices."""
    model.zero_grad()
    weight = model.model.layers[0].input_layernorm.weight.requires_grad_()
    model(torch.arange(7)[None], labels=torch.arange(7)[None]).loss.backward()
    return weight.grad.clone()


def test_without_bitsandbytes_there_is_a_sentence(base, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(str(base), quantize="4bit")


FULL = {"adapter": "full", "layers": (0,)}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("quantize", {**FULL, "quantize": "4bit"}), ("rank", {**FULL, "rank": 8}), ("alpha", {**FULL, "alpha": 8}),
        ("dropout", {**FULL, "dropout": 0.1}), ("targets", {**FULL, "targets": ("q_proj",)}),
        ("from_adapter", {**FULL, "from_adapter": "a"}), ("layers", {"from_adapter": "a", "layers": (0,)}),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, rows, name, settings):
    with pytest.raises(RecipeError, match=f"^{name} is"):
        check(recipe(tmp_path, rows, tmp_path / "run", **settings))
