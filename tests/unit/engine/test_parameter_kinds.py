"""What cannot be recorded by row is refused by name, before anything runs."""

import pytest
import torch
from peft import AdaLoraConfig, GraloraConfig, LoHaConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from support.adapted import ADAPTED, adapted, from_config, shake
from support.tiny import batch, tiny
from torch import nn

from siftune import GAST
from siftune.base.errors import AdapterError, UnsupportedError
from siftune.engine.groups import group_by_layer
from siftune.engine.kinds import Kind, kinds_of

REST = {"select": 2, "support": "rest"}


def attach(model, **settings):
    return GAST(**REST | settings).attach(model)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def dora_with_biases():
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all", use_dora=True)
    return shake(get_peft_model(tiny("opt"), config))


def experts_in_a_list():
    """Adapters on experts that are modules of their own."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "experts.0"]))


def lora_that_waits():
    return from_config(LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"))


def vera_with_dropout():
    return from_config(VeraConfig(r=2, target_modules=["q_proj"], vera_dropout=0.1))


def loha_with_dropout():
    return from_config(LoHaConfig(r=2, target_modules=["q_proj"], module_dropout=0.1))


def adalora():
    return from_config(AdaLoraConfig(target_r=2, init_r=3, target_modules=["q_proj"], total_step=9))


def shared_between_layers():
    model = adapted()
    layers = model.base_model.model.model.layers
    layers[1].mlp.up_proj.lora_A["default"].weight = layers[0].mlp.up_proj.lora_A["default"].weight
    return model


class Own(nn.Module):
    """A module of the user's, with a parameter that is used who knows how."""

    def __init__(self):
        super().__init__()
        self.knob = nn.Parameter(torch.ones(3))


def unknown_parameter():
    model = tiny("llama").requires_grad_(False)
    model.model.layers[2].mlp.own = Own()
    return model


@pytest.mark.parametrize(
    ("build", "kind", "words"),
    [
        (lora_that_waits, UnsupportedError, r"q_proj is a .*lora.layer.Linear with ALoraLinearVariant, .* use LoRA"),
        (vera_with_dropout, UnsupportedError, r"q_proj is a peft.tuners.vera.layer.Linear with dropout, .* to 0"),
        (loha_with_dropout, UnsupportedError, r"q_proj is a peft.tuners.loha.layer.Linear with dropout, .* to 0"),
        (
            adalora,
            UnsupportedError,
            r"layers.0 has AdaLoRA, which allots its ranks by .* \(dense\)",
        ),
        (ADAPTED["lora on experts"], UnsupportedError, r"mlp.experts is a .*ParamWrapper, by which experts"),
        (experts_in_a_list, UnsupportedError, r"layers.0.mlp.experts: experts see tokens of all rows mixed"),
        (dora_with_biases, UnsupportedError, r"DoRA with trained biases .* set bias='none'"),
        (shared_between_layers, UnsupportedError, "layers share a trainable parameter"),
        (unknown_parameter, UnsupportedError, "gradient of knob in Own cannot be told apart by row"),
        (
            lambda: get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            UnsupportedError,
            "no parameters of its own in each layer",
        ),
        (lambda: tiny("llama").requires_grad_(False), AdapterError, "has a trainable parameter"),
    ],
)
def test_what_is_refused(build, kind, words):
    model = build()
    with pytest.raises(kind, match=words):
        attach(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["dora", "ia3", "loha"])
def test_what_is_not_tapped_under_compile(kind, whole):
    model = ADAPTED[kind]()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        group_by_layer(model)[1].module.compile(backend="eager")
    with pytest.raises(
        UnsupportedError, match=r"compiled by torch.compile, and .* turn torch_compile off, or use LoRA"
    ):
        attach(model)


@pytest.mark.parametrize(
    ("extra", "rows"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}, 1),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 1, 2]])}, 2),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}, 1),
    ],
)
def test_packed_rows(extra, rows):
    model = adapted()
    inputs = batch(model, rows)
    with attach(model, select=1), pytest.raises(UnsupportedError, match="packing or padding-free"):
        model(**inputs, **extra)


@pytest.mark.parametrize(
    "padded", [[1, 1, 1, 0, 1, 2, 3], [0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0, 0], [0, 1, 2, 3, 1, 1, 1]]
)
def test_positions_of_padded_rows_are_not_taken_for_packing(padded):
    model = adapted()
    inputs = batch(model, 2)
    where = torch.tensor([[0, 1, 2, 3, 4, 5, 6], padded])
    with attach(model, select=1) as sift:
        model(**inputs, position_ids=where).loss.backward()
    assert sift.last.selected.shape == (4, 1)


def test_hidden_states_without_rows():
    model = adapted()
    layer = group_by_layer(model)[0].module
    with attach(model, select=1), pytest.raises(UnsupportedError, match=r"given hidden states of shape \(6, 32\)"):
        layer(torch.zeros(6, 32))


def test_pairs_of_an_odd_batch():
    model = adapted()
    with attach(model, select=1, pairs=True), pytest.raises(UnsupportedError, match="batch of 3 rows cannot be pairs"):
        model(**batch(model, 3))


def test_a_module_that_does_not_see_rows():
    model = adapted()
    module = model.base_model.model.model.layers[0].mlp.up_proj
    module.register_forward_pre_hook(lambda m, args: (args[0][:, :3].flatten(0, 1),))
    with attach(model, select=1), pytest.raises(UnsupportedError, match=r"works on a tensor of shape \(9, 4\)"):
        model(**batch(model, 3))


def test_kinds():
    model = ADAPTED["dora gpt2"]()
    kinds = kinds_of(group_by_layer(model))
    assert set(kinds.values()) == {Kind.LINEAR, Kind.FLATTENED}
    kinds = kinds_of(group_by_layer(from_config(GraloraConfig(r=4, target_modules=["q_proj"]))))
    assert set(kinds.values()) == {Kind.GENERIC}
    kinds = kinds_of(group_by_layer(tiny("gpt2")))
    assert set(kinds.values()) == {Kind.TRANSPOSED, Kind.BIAS, Kind.NORM}
    kinds = kinds_of(group_by_layer(tiny("qwen3")))
    assert set(kinds.values()) == {Kind.LINEAR, Kind.SCALE}
