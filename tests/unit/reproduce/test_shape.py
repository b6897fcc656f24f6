"""What a run takes, from shapes alone: against a real tiny model, and against what is known of the large ones."""

from dataclasses import replace

import pytest
import torch
from support.tiny import tiny

from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.models.adapters import attach_adapter
from siftune.reproduce.protocol import protocol_of
from siftune.reproduce.shape import OVER_FLOOR, Shape, on_meta, shape_of

KNOWN = {  # parameters of the models, as their makers' checkpoints have them
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama3-8b": 8_030_261_248, "gpt-j-6b": 6_050_882_784,
    "opt-1.3b": 1_315_758_080, "opt-6.7b": 6_658_473_984,
}  # fmt: skip
LLAMA_LORA = 32 * 32 * (3 * (4096 + 4096) + 2 * (4096 + 11008))


@pytest.mark.parametrize("model", KNOWN)
def test_a_models_shape_is_the_real_ones(model):
    assert sum(p.numel() for p in on_meta(protocol_of(f"math-{model}").config).parameters()) == KNOWN[model]


@pytest.mark.matrix
@pytest.mark.parametrize("name", [f"commonsense-{model}" for model in KNOWN])
def test_every_protocol_can_be_told_dry(name):
    protocol = protocol_of(name)
    shape = shape_of(protocol, rows=170_300)
    assert shape.parameters == KNOWN[name.partition("-")[2]] + shape.trainable
    assert shape.steps == 3 * 10_644
    tokens, base = 16 * 256, shape.parameters - shape.trainable
    assert 1.85 <= shape.flops / (2 * tokens * base) < 2.3  # forward, and backward to the inputs; embeddings cost none
    assert shape.memory > 2 * base + 16 * shape.trainable
    if name == "commonsense-llama-7b":
        assert shape.trainable == LLAMA_LORA


def test_what_autograd_keeps_is_counted_as_on_a_real_model():
    protocol = protocol_of("commonsense-llama-7b")
    real = tiny("llama", layers=2).to(torch.bfloat16)
    real.set_attn_implementation("sdpa")
    config = {**real.config.to_dict(), "model_type": "llama"}
    small = replace(protocol, config=config, recipe=replace(protocol.recipe, rank=2, batch_size=3, max_length=9))
    shape = shape_of(small, rows=10)
    tuned = attach_adapter(real, rank=2, alpha=64, dropout=0.05, targets=list(protocol.recipe.targets)).train()
    kept, held, own = {}, [], {p.data_ptr() for p in tuned.parameters()}

    def note(tensor):
        held.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mask = torch.zeros(3, 1, 9, 9, dtype=torch.bfloat16)
    ids = torch.zeros(3, 9, dtype=torch.long)
    with use_base_dtype(tuned, group_by_layer(tuned)), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        tuned(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    base = sum(p.numel() for p in tuned.parameters() if not p.requires_grad)
    assert (shape.trainable, shape.parameters) == (trainable, base + trainable)
    head = 3 * 9 * real.config.vocab_size * 6
    assert shape.memory == pytest.approx(2 * base + 16 * trainable + head + sum(kept.values()), rel=0.05)


def test_ratios_that_were_not_measured_are_not_made_up():
    shape = Shape(10, 1, steps=100, flops=312e12, memory=1e9)
    assert shape.seconds("a100-80gb") == pytest.approx(100 * OVER_FLOOR)
    assert shape.seconds("a100-80gb", "gast") == pytest.approx(127 * OVER_FLOOR)
    assert shape.seconds("a100-80gb", "lisa") is None
    assert (shape.bytes("ist"), shape.bytes("cut")) == (pytest.approx(0.89e9), None)
