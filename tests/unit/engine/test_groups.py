"""Parameters by layer: what trains where, and what is refused."""

import pytest
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from support.adapted import ADAPTED, adapted
from support.tiny import tiny

from siftune.base.errors import AdapterError, UnsupportedError
from siftune.engine.groups import group_by_layer, outside
from siftune.models.layers import find_layers


@pytest.mark.parametrize("name", ADAPTED)
def test_groups_and_outside_are_all_that_trains(name):
    model = ADAPTED[name]()
    groups = group_by_layer(model)
    assert [group.index for group in groups] == [0, 1, 2, 3]
    named = {f"{g.name}.{n}": p for g in groups for n, p in g.parameters.items()}
    named |= outside(model, groups)
    assert named == {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(model.get_submodule(group.name) is group.module for group in groups)


def test_groups_leave_out_layers_and_parameters_that_do_not_train():
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["model.norm"])
    model = get_peft_model(tiny("llama"), config)
    for name, parameter in model.named_parameters():
        if ".layers.1." in name or "lora_A" in name:
            parameter.requires_grad_(False)
    groups = group_by_layer(model)
    assert [group.index for group in groups] == [0, 2, 3]
    assert [list(g.parameters) for g in groups] == [["self_attn.q_proj.lora_B.default.weight"]] * 3
    assert {n.split(".")[-3] for n in outside(model, groups)} == {"lora_B", "modules_to_save"}


def test_groups_of_a_model_without_adapters():
    model = tiny("gpt2")
    groups = group_by_layer(model)
    assert sum(len(g.parameters) for g in groups) == len(list(model.transformer.h.parameters()))
    assert set(outside(model, groups)) == {n for n, _ in model.named_parameters() if ".h." not in n}


def test_nothing_trains_in_any_layer():
    model = tiny("llama")
    model.model.layers.requires_grad_(False)
    with pytest.raises(AdapterError, match="adapter"):
        group_by_layer(model)


def test_sharing_between_layers_is_refused():
    model = adapted()
    first, second = (layer.self_attn.q_proj for layer in find_layers(model).layers[1:3])
    second.lora_A["default"].weight = first.lora_A["default"].weight
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.q_proj\.lora_A.* is .*layers\.2\.self_attn\.q"):
        group_by_layer(model)


def test_prompt_tuners_are_refused():
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert len(find_layers(model).layers) == 4
    with pytest.raises(UnsupportedError, match="PREFIX_TUNING"):
        group_by_layer(model)
