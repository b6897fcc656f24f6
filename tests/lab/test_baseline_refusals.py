"""What the baselines do not take, they refuse."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from support.adapted import from_config
from support.by_row import PASSES, double, runner
from support.tiny import batch, tiny

from lab.baselines import StoreAll, TwoPass
from siftune.base.errors import RecipeError, UnsupportedError
from siftune.methods.options import GASTSettings
from siftune.models.adapters.attach import attach_adapter


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(
    "settings",
    [{"support": "momentum"}, {"choice": "random"}, {"score": "cosine"}, {"support": "dataset"}],
)
def test_other_settings_are_refused(kind, settings):
    with pytest.raises(RecipeError, match=f"{next(iter(settings))} .*not {next(iter(settings.values()))}"):
        kind(double(), GASTSettings(**settings))


def with_head():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(tiny("llama"), config)


OTHERS = {
    "dora": lambda: attach_adapter(tiny("llama"), "dora", rank=2),
    "ia3": lambda: from_config(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "biases": lambda: get_peft_model(tiny("qwen2"), LoraConfig(r=2, target_modules=["q_proj"], bias="all")),
    "LoRA's biases": lambda: get_peft_model(
        tiny("opt"), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    ),
    "aLoRA": lambda: get_peft_model(
        tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    ),
    "the head": with_head,
    "all weights": lambda: tiny("llama"),
    "experts": lambda: from_config(
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]), "mixtral"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_only_lora_matrices_of_linear_modules_may_train(name):
    with pytest.raises(UnsupportedError, match="plain LoRA on linear modules"):
        TwoPass(OTHERS[name](), GASTSettings(support="rest"))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("baselines.world_size", lambda: 2)
    with pytest.raises(UnsupportedError, match="one process; 2 are at work"):
        StoreAll(double(), GASTSettings(support="rest"))


@pytest.mark.parametrize("kind", PASSES)
def test_modules_that_do_not_see_rows_are_refused(kind):
    model = double()
    matrix = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("lora_A.default")))
    matrix.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),))
    with pytest.raises(UnsupportedError, match="cannot be told apart"):
        kind(model, GASTSettings(support="rest")).step(batch(model, 4), runner(model))


@pytest.mark.parametrize(("count", "uses"), [(0, 0), (2, 2)])
def test_matrices_are_used_once(count, uses):
    model = double(targets=["q_proj"])
    run = runner(model)

    def often(part):
        for _ in range(count):
            run(part)
        return torch.zeros(())

    matrices = sum(p.requires_grad for p in model.parameters())
    with pytest.raises(UnsupportedError, match=f"{uses * matrices} uses of {matrices}"):
        StoreAll(model, GASTSettings(support="rest")).step(batch(model, 4), often)
