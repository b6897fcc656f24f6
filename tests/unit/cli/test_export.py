"""`siftune export`: an ordinary model that gives the logits of base and adapter."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.commands import error_of
from support.rounded import SIZES
from support.tiny import tiny
from support.tiny_run import recipe, save_rows
from support.tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.cli.main import main
from siftune.models.load import load_model
from siftune.train.run import train

QUIET = Console(quiet=True)
IDS = torch.tensor([[5, 80, 91, 17, 200, 44]])


@pytest.fixture(scope="module", params=["lora", "rslora", "dora"])
def finished(request, base, tmp_path_factory):
    """A run's folder, and the logits of its model."""
    place = tmp_path_factory.mktemp("finished")
    settings = {"adapter": request.param, "method": "dense", "lr": 0.05}
    done = train(recipe(base, save_rows(place / "rows.jsonl"), place / "run", **settings), QUIET)
    with torch.no_grad():
        return done.folder.path, done.model.eval()(IDS).logits


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def test_the_merged_model_gives_the_logits_of_the_tuned_one(finished, base, tmp_path, capsys):
    run, tuned = finished
    assert main(["export", str(run), "--out", str(tmp_path / "merged"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"model": f"{tmp_path}/merged", "adapter": f"{run}/adapter"}
    torch.testing.assert_close(logits(tmp_path / "merged"), tuned, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "merged"), apart, rtol=1e-4, atol=1e-4)
    assert float((logits(base) - tuned).abs().max()) > 0.01
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    text = "12 and 3?"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text).input_ids == (
        AutoTokenizer.from_pretrained(base)(text).input_ids
    )
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("place", ["run", "run/adapter"])
def test_layers_that_were_tuned_themselves(base, rows, tmp_path, capsys, place):
    settings = {"adapter": "full", "layers": (0, -1), "method": "dense", "steps": 2, "lr": 0.05}
    done = train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    assert main(["export", str(tmp_path / place), "--out", str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": f"{tmp_path}/merged", "adapter": f"{tmp_path}/run/adapter",
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "merged"), done.model.eval()(IDS).logits)
    assert not torch.equal(logits(tmp_path / "merged"), logits(base))
    assert not any("tuned" in path.name for path in (tmp_path / "merged").iterdir())
    assert main(["export", str(tmp_path / place), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], done.model.state_dict()[name].bfloat16())


def test_the_chat_template_of_the_training_is_exported(base, rows, tmp_path, capsys):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    train(recipe(base, rows, tmp_path / "run", template=template, max_length=128), QUIET)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    asked = [{"role": "user", "content": "Hi"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "[user]Hi[/][assistant]"
    inside = tmp_path / "run" / "adapter" / "chat_template.jinja"
    inside.write_bytes(b"\xff\xfe")
    capsys.readouterr()
    assert "cannot be read" in error_of(capsys, "export", tmp_path / "run", "--out", tmp_path / "other")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_a_matrix_that_two_modules_share_is_refused(rows, tmp_path, capsys, target, tied):
    tokenizer = byte_tokenizer()
    tiny("llama", 2, vocab_size=len(tokenizer), tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"method": "dense", "targets": (target, "q_proj"), "lr": 0.05}
    done = train(recipe(tmp_path / "base", rows, tmp_path / "run", **settings), QUIET)
    if tied:
        assert "share a matrix in this model" in error_of(capsys, "export", tmp_path / "run")
        assert not (tmp_path / "run" / "merged").exists()
        return
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "merged"), done.model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_quantized_base_is_refused(rows, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    tokenizer = byte_tokenizer()
    tiny("llama", 2, vocab_size=len(tokenizer), **SIZES).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    load_model(str(tmp_path / "plain"), quantize="8bit")[0].save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    train(recipe(tmp_path / "rounded", rows, tmp_path / "run", method="dense", steps=1), QUIET)
    assert "is quantized" in error_of(capsys, "export", tmp_path / "run")


@pytest.fixture
def run(base, rows, tmp_path):
    return train(recipe(base, rows, tmp_path / "run", steps=2), QUIET).folder


def test_places(run, tmp_path, capsys):
    assert main(["export", str(run.path)]) == 0
    assert (run.path / "merged" / "config.json").is_file()
    (tmp_path / "empty").mkdir()
    assert main(["export", str(run.adapter), "--out", str(tmp_path / "empty")]) == 0  # an adapter without a run
    capsys.readouterr()
    before = (run.path / "merged" / "model.safetensors").read_bytes()
    assert error_of(capsys, "export", run.path).startswith(f"{run.path}/merged is an earlier export")
    assert (run.path / "merged" / "model.safetensors").read_bytes() == before
    found = error_of(capsys, "export", run.path, "--out", tmp_path / "rows.jsonl")
    assert found.startswith(f"{tmp_path}/rows.jsonl cannot be written to (Not a directory)")
    found = error_of(capsys, "export", run.path, "--out", tmp_path / "rows.jsonl" / "merged")
    assert found.startswith(f"{tmp_path}/rows.jsonl/merged cannot be written to (")


def test_what_cannot_be_merged(run, base, tmp_path, capsys):
    assert error_of(capsys, "export", base).startswith(f"{base} holds no adapter")
    path = run.adapter / "adapter_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(path).items()}, path)
    found = error_of(capsys, "export", run.path, "--out", tmp_path / "x")
    assert found.startswith(f"the adapter in {run.adapter} cannot be merged: NaNs detected")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / ".x.partial").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"alora_invocation_tokens": [5]}, "aLoRA does not support"),
        ({"lora_bias": True}, "Impossible to merge LoRA with"),
    ],
)
def test_an_adapter_that_peft_cannot_merge_is_refused(base, tmp_path, capsys, settings, reason):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    found = error_of(capsys, "export", tmp_path / "lora", "--base", base, "--out", tmp_path / "merged")
    assert found.startswith(f"the adapter in {tmp_path / 'lora'} cannot be merged: {reason}")
    assert not (tmp_path / "merged").exists()


def test_the_licence_in_the_hubs_cache_is_copied(run, base, tmp_path):
    """The cache's folders consist of links."""
    repository = tmp_path / "models--owner--name"
    shutil.copytree(base, repository / "blobs")
    (repository / "blobs" / "LICENSE").write_text("the licence")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert main(["export", str(run.path), "--base", str(snapshot), "--out", str(tmp_path / "x")]) == 0
    assert (tmp_path / "x" / "LICENSE").read_text() == "the licence"
    assert not (tmp_path / "x" / "LICENSE").is_symlink()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_the_folder_to_write(run, tmp_path, capsys, exists):
    """One that the user names leads there; in the run folder, another party could have put it."""
    if exists:
        (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    assert main(["export", str(run.path), "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "big" / "config.json").is_file()
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "other").mkdir()
    (run.path / "merged").symlink_to(tmp_path / "other")
    capsys.readouterr()
    assert error_of(capsys, "export", run.path).startswith(f"{run.path}/merged is a symbolic link")
    assert not [*(tmp_path / "other").iterdir()]
