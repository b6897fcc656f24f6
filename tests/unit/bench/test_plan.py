"""Memory and operations of a step without weights: exact where they can be added up by hand, and what is refused."""

import json

import pytest
import torch
from transformers import AutoConfig

from siftune.base.errors import ModelError
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
