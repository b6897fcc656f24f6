import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from siftune.base.errors import AdapterError, ModelError
from siftune.cli.subjects import find_subject, kind_of_subject, load_base, load_subject
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import Recipe
from siftune.train.folder.checkpoints import begin, seal
from siftune.train.folder.weights import About, save_tuned


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tokenizer = byte_tokenizer()
    tiny("llama", layers=2, vocab_size=len(tokenizer)).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """A run folder's adapter, with weights that change the model."""
    model, _ = load_subject(find_subject(str(base)))
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    folder = tmp_path / "run" / "adapter"
    tuned.save_pretrained(folder)
    return folder


def test_a_model(base):
    subject = find_subject(str(base))
    assert (subject.base, subject.adapter, subject.recipe) == (str(base), None, None)
    model, tokenizer = load_subject(subject)
    assert not model.training
    assert tokenizer.eos_token == "<|end|>"


def test_an_adapter_names_its_base(base, adapter):
    subject = find_subject(str(adapter))
    assert (subject.base, subject.adapter, subject.recipe) == (str(base), adapter, None)
    tuned, _ = load_subject(subject)
    ids = torch.arange(5)[None]
    with torch.no_grad(), tuned.disable_adapter():
        plain = tuned(ids).logits
    assert not torch.allclose(tuned(ids).logits, plain, atol=1e-3)
    assert len({parameter.dtype for parameter in tuned.parameters()}) == 1


def test_a_run_has_recipe_and_adapter(base, adapter):
    run = adapter.parent
    (run / "recipe.yaml").write_text(recipe_to_yaml(Recipe(model=str(base), eval="rows.jsonl")))
    subject = find_subject(str(run))
    assert (subject.name, subject.base, subject.adapter) == (str(run), str(base), adapter)
    assert subject.recipe.eval == "rows.jsonl"


@pytest.mark.parametrize(("step", "told"), [(8, False), (12, True)])
def test_a_run_that_was_resumed_and_killed(base, adapter, caplog, step, told):
    run, checkpoint = adapter.parent, adapter.parent / "checkpoints" / f"checkpoint-{step}"
    (run / "recipe.yaml").write_text(recipe_to_yaml(Recipe(model=str(base), eval="rows.jsonl")))
    (run / "run.json").write_text(json.dumps({"status": "finished", "summary": {"steps": 8}}))
    begin(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    seal(checkpoint)
    begin(run / "checkpoints" / "checkpoint-20")  # half written
    assert find_subject(str(run)).adapter == adapter
    lines = [
        f"{adapter} is of step 8, but the run has trained to step 12 since: siftune train --resume {run} finishes it"
    ]
    assert caplog.messages == (lines if told else [])


def test_a_run_that_is_not_finished(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: smollm2")
    with pytest.raises(ModelError, match=f"has no adapter yet; .* --resume {tmp_path}"):
        find_subject(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read"),
        ('{"peft_type": "LORA"}', "names no base model"),
        ('{"peft_type": "LORA", "base_model_name_or_path": ""}', "names no base model"),
    ],
)
def test_an_adapter_without_a_base(tmp_path, config, message):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match=message):
        find_subject(str(tmp_path))


@pytest.mark.parametrize("change", [{"target_modules": ["nothing"]}, {"r": 3}, {"bias": "spell"}])
def test_an_adapter_of_another_model(adapter, change):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match="does not fit"):
        load_subject(find_subject(str(adapter)))


# --- layers that were tuned themselves


@pytest.fixture
def tuned(base, tmp_path):
    """A run folder's layers, and the tensor that was tuned."""
    weight = torch.full_like(load_file(base / "model.safetensors")[NAME], 0.5)
    folder = tmp_path / "run" / "adapter"
    save_tuned(folder, About(str(base), (1,)), {NAME: weight})
    return folder


NAME = "model.layers.1.self_attn.q_proj.weight"


def test_layers_are_put_into_their_base(base, tuned):
    run = tuned.parent
    (run / "recipe.yaml").write_text(recipe_to_yaml(Recipe(model=str(base))))
    for source in (run, tuned):
        subject = find_subject(str(source))
        assert (subject.base, subject.adapter) == (str(base), tuned)
        model, _ = load_subject(subject, "float32")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        before = load_base(subject, "float32")[0].state_dict()
        changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
        assert changed == {NAME}
        assert torch.equal(model.state_dict()[NAME], torch.full((32, 32), 0.5))
    assert kind_of_subject(subject) is None
