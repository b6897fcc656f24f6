"""What a run takes, from shapes alone: against a real tiny model, and against what is known of the large ones."""

from dataclasses import replace

import pytest
import torch
from support.tiny import tiny

from lab.reproduce.offsite import outer_layers_of
from lab.reproduce.protocol import protocol_of
from lab.reproduce.shape import OVER_FLOOR, Shape, on_meta, shape_of
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.models.adapters.attach import attach_adapter

KNOWN = {  # parameters of the models, as their makers' checkpoints have them
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama3-8b": 8_030_261_248, "gpt-j-6b": 6_050_882_784,
    "opt-1.3b": 1_315_758_080, "opt-6.7b": 6_658_473_984, "smollm2": 134_515_008, "gemma3-270m": 268_098_176,
}  # fmt: skip
LLAMA_LORA = 32 * 32 * (3 * (4096 + 4096) + 2 * (4096 + 11008))


@pytest.mark.parametrize("model", KNOWN)
def test_a_models_shape_is_the_real_ones(model):
    assert sum(p.numel() for p in on_meta(protocol_of(f"math-{model}").config).parameters()) == KNOWN[model]


@pytest.mark.matrix
@pytest.mark.parametrize("name", [f"commonsense-{model}" for model in [*KNOWN][:6]])
def test_every_protocol_can_be_told_dry(name):
    protocol = protocol_of(name)
    shape = shape_of(protocol.config, protocol.recipe, rows=170_300)
    assert shape.parameters == KNOWN[name.partition("-")[2]] + shape.trainable
    assert shape.steps == 3 * 10_644
    tokens, base = 16 * 256, shape.parameters - shape.trainable
    assert 1.85 <= shape.flops / (2 * tokens * base) < 2.3  # forward, and backward to the inputs; embeddings cost none
    assert shape.memory > 2 * base + 16 * shape.trainable
    if name == "commonsense-llama-7b":
        assert shape.trainable == LLAMA_LORA


SMALL = {"rank": 2, "batch_size": 3, "max_length": 9}


def small_model(layers):
    """A protocol's recipe for a real tiny model, its config, and the model with the protocol's adapter."""
    recipe = replace(protocol_of("commonsense-llama-7b").recipe, **SMALL)
    real = tiny("llama", layers=layers).to(torch.bfloat16)
    real.set_attn_implementation("sdpa")
    tuned = attach_adapter(real, rank=2, alpha=64, dropout=0.05, targets=list(recipe.targets)).train()
    return recipe, {**real.config.to_dict(), "model_type": "llama"}, tuned


def kept_by(tuned):
    """Bytes that autograd keeps of a step, weights left out."""
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
    return sum(kept.values())


def held_besides(tuned):
    """Bytes that a step needs besides: weights, Adam's values, and logits."""
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    base = sum(p.numel() for p in tuned.parameters() if not p.requires_grad)
    return 2 * base + 16 * trainable + 3 * 9 * tuned.get_base_model().config.vocab_size * 6


def test_what_autograd_keeps_is_counted_as_on_a_real_model():
    recipe, config, tuned = small_model(layers=2)
    shape = shape_of(config, recipe, rows=10)
    assert shape.trainable == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert shape.parameters == sum(p.numel() for p in tuned.parameters())
    assert shape.memory == pytest.approx(held_besides(tuned) + kept_by(tuned), rel=0.05)


def test_checkpointing_keeps_the_layers_inputs_and_all_of_one_layer_and_runs_them_again():
    recipe, config, tuned = small_model(layers=6)
    plain, saving = (shape_of(config, replace(recipe, checkpointing=on), rows=10) for on in (False, True))
    layer = kept_by(tuned) / 6
    tuned.enable_input_require_grads()
    tuned.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    inputs = kept_by(tuned)
    assert inputs < layer
    assert saving.memory - held_besides(tuned) == pytest.approx(inputs + layer, rel=0.1)
    assert saving.flops == 1.5 * plain.flops


def test_ratios_that_were_not_measured_are_not_made_up():
    shape = Shape(10, 1, steps=100, flops=312e12, memory=1e9)
    assert shape.seconds("a100-80gb") == pytest.approx(100 * OVER_FLOOR)
    assert shape.seconds("a100-80gb", "gast") == pytest.approx(136 * OVER_FLOOR)
    assert shape.bytes("ist") == pytest.approx(0.88e9)


def layer_of(config, width):
    return width * width * 4 + 2 * width * config["ffn_dim"] + config["ffn_dim"] + 9 * width


def test_whole_outer_layers_train_and_an_emulator_has_a_part_of_the_middle():
    protocol = protocol_of("gradot-opt-1.3b")
    config = {**protocol.config, "num_hidden_layers": 6}
    recipe, positions = outer_layers_of(protocol.recipe), 32 * 1024
    shape = shape_of(config, recipe, rows=1000)
    layer = layer_of(config, 2048)
    assert (shape.trainable, shape.middle) == (4 * layer, 2 * layer)
    assert shape.parameters == KNOWN["opt-1.3b"] - 18 * layer
    assert shape.steps == 5 * 32
    assert shape.positions == positions
    lora = replace(recipe, adapter="lora", rank=1, layers=(0,))
    plain = shape_of(config, lora, rows=1000)
    assert shape.flops - plain.flops == pytest.approx(2 * positions * 4 * layer, rel=0.03)  # the weights' own gradients
    half = shape.emulated(0.5)
    assert shape.parameters - half.parameters == layer
    assert shape.flops - half.flops == 4 * positions * layer
    assert shape.memory - half.memory == 2 * layer
    assert shape.emulated(1.0) == shape
