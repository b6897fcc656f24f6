"""How an adapter begins: what is saved fits the base as it is, and a run continues with a trained adapter."""

import importlib.util
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from support.tiny import tiny
from support.tiny_run import recipe
from support.tokenizer import byte_tokenizer
from support.trainers import weights
from transformers import AutoModelForCausalLM

from siftune.base.errors import AdapterError, ModelError, RecipeError
from siftune.models.load import load_model
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.train.build import trainable
from siftune.train.run import train

QUIET = Console(quiet=True)
IDS = torch.tensor([[5, 80, 91, 17, 200, 44]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def base_logits(base):
    return logits(AutoModelForCausalLM.from_pretrained(base))


def test_pissa_is_saved_as_an_ordinary_lora(base, rows, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* changes the base weights")  # advice that has been followed
        done = train(recipe(base, rows, tmp_path / "run", method="dense", init="pissa"), QUIET)
    config = json.loads((done.folder.adapter / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 4)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), done.folder.adapter)
    torch.testing.assert_close(logits(again), logits(done.model), rtol=1e-4, atol=1e-4)
    assert float((logits(again) - base_logits(base)).abs().max()) > 1e-2


@pytest.mark.parametrize("init", ["olora", "orthogonal"])
def test_a_run_begins_where_its_base_is(base, rows, tmp_path, init):
    """The first loss is the base's: whatever is taken off the base is in the adapter."""
    found = [
        train(recipe(base, rows, tmp_path / one, method="dense", init=one, steps=1), QUIET) for one in ("default", init)
    ]
    plain, other = (run.summary["loss_first"] for run in found)
    assert other == pytest.approx(plain, rel=1e-5)
    a, b = (next(v for n, v in weights(run.model).items() if "lora_A" in n) for run in found)
    assert not torch.allclose(a, b, atol=1e-2)


def test_a_run_that_took_the_base_apart_goes_on_bit_for_bit(base, rows, tmp_path):
    given = {"method": "gast", "init": "pissa", "save_every": 3}
    whole = train(recipe(base, rows, tmp_path / "whole", **given), QUIET)
    train(recipe(base, rows, tmp_path / "cut", **given | {"steps": 3}), QUIET)
    end = train(
        recipe(base, rows, tmp_path / "again", **given, resume=str(tmp_path / "whole/checkpoints/checkpoint-3")), QUIET
    )
    ours, theirs = weights(end.model), weights(whole.model)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_other_first_values_are_refused_on_resuming(base, rows, tmp_path):
    train(recipe(base, rows, tmp_path / "run", method="dense", init="pissa", steps=2, save_every=2), QUIET)
    with pytest.raises(RecipeError, match="a run with init pissa, this recipe has default"):
        train(recipe(base, rows, tmp_path / "run", method="dense", steps=4, resume=True), QUIET)


# an adapter that was trained before


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
def test_an_adapter_of_another_form_is_refused_by_name(base, rows, tmp_path, settings, words):
    first = train(recipe(base, rows, tmp_path / "first", method="dense", steps=1), QUIET)
    with pytest.raises(RecipeError, match=words):
        train(recipe(base, rows, tmp_path / "run", from_adapter=str(first.folder.path), **settings), QUIET)


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
    with pytest.raises(
        ModelError, match="quantize needs bitsandbytes, which is not installed: `pip install bitsandbytes`"
    ):
        load_model(str(base), quantize="4bit")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter": "full", "init": "pissa", "method": "dense", "layers": (0,)}, "init is for adapters"),
        ({"adapter": "full", "quantize": "4bit", "layers": (0,)}, "quantize is for adapters"),
        ({"adapter": "full", "rank": 8, "layers": (0,)}, "rank is for adapters, and adapter full has none"),
        ({"adapter": "full", "alpha": 8, "layers": (0,)}, "alpha is for adapters"),
        ({"adapter": "full", "dropout": 0.1, "layers": (0,)}, "dropout is for adapters"),
        ({"adapter": "full", "targets": ("q_proj",), "layers": (0,)}, "targets is for adapters"),
        ({"adapter": "full", "from_adapter": "a", "layers": (0,)}, "from_adapter is for adapters"),
        ({"init": "pissa", "quantize": "8bit", "method": "dense"}, "which quantize has rounded"),
        ({"init": "olora", "adapter": "dora", "method": "dense"}, "goes with adapter lora, not dora"),
        ({"init": "pissa", "method": "ist"}, "method ist damps or measures what adapters add"),
        ({"init": "olora", "method": "ist"}, "method ist damps or measures what adapters add"),
        ({"from_adapter": "a", "init": "gaussian"}, "init is the adapter's"),
        ({"from_adapter": "a", "layers": (0,)}, "layers is the adapter's"),
        ({"init": "eva"}, "init is 'eva'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, rows, settings, words):
    with pytest.raises(RecipeError, match=words):
        check(recipe(tmp_path, rows, tmp_path / "run", **settings))
