"""Memory and operations of a step without weights: exact where they can be added up by hand, and what is refused."""

import json

import pytest
import torch
from transformers import AutoConfig

from siftune.base.errors import InputError, ModelError
from siftune.bench.cost import Workload
from siftune.bench.plan import config_of, plan
from siftune.cli.main import main

WORK = Workload(batch_size=4, length=32, rank=4, targets=("q_proj",))
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
CONFIG = AutoConfig.for_model("llama", vocab_size=300, dtype=torch.bfloat16, **SIZES)


def test_parameters_states_and_operations_can_be_added_up():
    need = plan(CONFIG, WORK, "dense", attention="eager")
    base = 2 * 300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    adapters = 2 * 2 * 4 * 64
    assert need.parameters == 2 * base + 4 * adapters
    assert need.states == 8 * adapters
    assert need.peak == need.parameters + need.gradients + need.states + need.activations
    tokens, labels = 4 * 32, 4 * 8
    linear, head, low = 2 * tokens * (4 * 64 * 64 + 3 * 64 * 96), 2 * labels * 300 * 64, 2 * tokens * 64 * 4
    scores = 2 * 4 * 32 * 32 * 64  # a product of queries and keys, or of weights and values
    forward = 2 * linear + head + 2 * 2 * scores + 2 * 2 * low
    # in the first layer, the input of q, k and v needs no gradient, nor do keys and values
    backward = 2 * linear - 3 * 2 * tokens * 64 * 64 + head + (2 * 4 - 2) * scores + (4 + 3) * low
    assert need.flops == forward + backward


def test_checkpointing_takes_memory_for_operations_and_selection_adds_some():
    dense, lean = plan(CONFIG, WORK, "dense"), plan(CONFIG, WORK, "dense", checkpointing=True)
    assert lean.peak < dense.peak
    assert lean.flops > 1.2 * dense.flops
    rest, sample = plan(CONFIG, WORK, "gast-rest"), plan(CONFIG, WORK, "gast-sample")
    assert dense.peak < rest.peak <= sample.peak
    assert dense.flops < rest.flops < sample.flops


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_table_of_any_config(tmp_path, capsys, where):
    CONFIG.save_pretrained(tmp_path)
    model = tmp_path / "config.json" if where == "file" else tmp_path
    sizes = ["--batch-size", "4", "--length", "32"]
    arguments = ["bench", "--plan", str(model), *sizes, "--methods", "dense,rst", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(step["method"], step["checkpointing"]) for step in result["plan"]] == [
        ("dense", False), ("rst", False), ("dense", True), ("rst", True),
    ]  # fmt: skip
    assert (result["workload"]["batch_size"], result["workload"]["length"]) == (4, 32)


PLAIN = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip
FORMS = [
    *({"model_type": kind} for kind in ("none", ["llama"], None, "clip")),
    *({"hidden_size": size} for size in ("64", -64, 0, 64.5, 2**62)),
    *({"num_attention_heads": heads} for heads in (0, 3)),
    *({"num_key_value_heads": heads} for heads in (3, 0)),
    {"num_hidden_layers": 10**6}, {"num_hidden_layers": 0}, {"vocab_size": 0}, {"vocab_size": 10**18},
    {"dtype": "float7"}, {"torch_dtype": [1]}, {"hidden_act": "none"}, {"rope_scaling": {"rope_type": "none"}},
    {"rope_parameters": [1]}, {"quantization_config": [1]}, {"id2label": 5}, {"num_labels": "x"},
    {"pad_token_id": 10**9}, {"head_dim": 0}, {"text_config": 5}, {"text_config": {"model_type": "llama"}},
    {"layer_types": ["none"]},
]  # fmt: skip


@pytest.mark.parametrize("change", FORMS, ids=str)
def test_a_config_of_another_form_is_one_sentence(tmp_path, capsys, change):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PLAIN | change))
    assert main(["bench", "--plan", str(path), "--methods", "dense", "--batch-size", "2", "--length", "16"]) == 2
    message = capsys.readouterr().err
    assert message.strip()
    assert "Traceback" not in message


@pytest.mark.parametrize("text", ["null", "5", "[1]", '"x"', "[" * 100_000, '{"hidden_size": 1' + "0" * 5000 + "}"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    for place in (path, tmp_path):
        with pytest.raises(InputError, match=r"config\.json cannot be read .*; give another config"):
            config_of(str(place))


def test_a_config_does_not_choose_the_kernels_of_attention(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PLAIN | {"attn_implementation": "org/kernel"}))
    assert plan(config_of(str(path)), WORK, "dense").peak > 0


def test_what_has_no_plan_is_refused(tmp_path, capsys):
    for arguments, said in (
        (["--plan", "llama-7b", "--rounds", "2"], "rounds"),
        (["--plan", "llama-7b", "--methods", "trl"], "trl"),
        (["--plan", str(tmp_path / "none.json")], "none.json"),
    ):
        assert main(["bench", *arguments]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        config_of(str(tmp_path / "config.json"))
    with pytest.raises(ModelError, match="causal"):
        plan(AutoConfig.for_model("t5"), WORK, "dense")
