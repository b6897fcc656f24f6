"""Tiny models with adapters of every kind that a method may meet."""

from functools import partial

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from support.tiny import tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siftune.engine.groups import group_by_layer
from siftune.models.adapters.attach import attach_adapter


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set trainable matrices and change trainable vectors at random, so that adapters respond, always the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                if min(parameter.shape) > 1:
                    parameter.zero_()
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


def adapted(family: str = "llama", kind: str = "lora", **settings) -> PeftModel:
    return shake(attach_adapter(base(family), kind, **{"rank": 4, **settings})).eval()


def base(family: str) -> nn.Module:
    model = tiny(family)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no float64
    return model


def lora_with_patterns() -> PeftModel:
    """Different ranks and scales per module and layer."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        rank_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 8},
        alpha_pattern={"layers.2.self_attn.q_proj": 1, "down_proj": 9},
        lora_bias=True,
    )
    return shake(get_peft_model(tiny("llama", attention_bias=True, mlp_bias=True), config)).eval()


def two_active_adapters() -> PeftModel:
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=9, target_modules=["q_proj", "o_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return shake(model).eval()


def lora_and_dora() -> PeftModel:
    """One plain and one DoRA adapter on the same modules, both active."""
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    return shake(model).eval()


def from_config(config, family: str = "llama") -> PeftModel:
    return shake(get_peft_model(base(family), config)).eval()


ADAPTED = {
    "lora": adapted,
    "lora gpt2": lambda: adapted("gpt2"),
    "lora patterns": lora_with_patterns,
    "rslora": lambda: adapted(kind="rslora"),
    "two adapters": two_active_adapters,
    "lora and dora": lora_and_dora,
    "dora": lambda: adapted(kind="dora"),
    "dora gpt2": lambda: adapted("gpt2", "dora"),
    "ia3": lambda: from_config(
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "series": lambda: adapted(kind="series"),
    "parallel on both, opt": lambda: adapted("opt", "parallel", targets=["attention", "mlp"]),
    "parallel beside experts": lambda: adapted("mixtral", "parallel"),
    "loha": lambda: from_config(LoHaConfig(r=2, target_modules=["q_proj", "up_proj"])),
    "lora on experts": lambda: from_config(
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]), "mixtral"
    ),
}


def checkpoint_whole_layers(model: nn.Module, monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    """Run each layer under activation checkpointing with its hooks, as models do that call `checkpoint` themselves."""
    model.config.use_cache = False  # a layer that runs again would add to it
    kind = type(group_by_layer(model)[0].module)

    def call(self: nn.Module, hidden: Tensor, *args, **kwargs):
        run = partial(nn.Module.__call__, self, **kwargs)
        return checkpoint(run, hidden, *args, use_reentrant=reentrant)

    monkeypatch.setattr(kind, "__call__", call)


class Looped(nn.ModuleList):
    """Layers that a model goes through twice, all but the first; without caches."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return [*found, *list(found)[1:]] if isinstance(index, slice) else found


def looped(**settings) -> PeftModel:
    """A Llama that goes through its layers in a loop, as recurrent transformers do."""
    base = tiny("llama")
    base.config.use_cache = False
    base.model.layers = Looped(base.model.layers)
    return shake(attach_adapter(base, **{"rank": 4, **settings})).eval()
