"""What cannot be recorded by row is refused by name, before anything runs."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from support.adapted import ADAPTED, adapted, from_config, shake
from support.tiny import batch, tiny
from torch import nn

from siftune import GAST, IST, RST
from siftune.base.errors import AdapterError, UnsupportedError
from siftune.engine.groups import group_by_layer
from siftune.engine.kinds import Kind
from siftune.engine.survey import Survey

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


def vera():
    return from_config(VeraConfig(r=2, target_modules=["q_proj"]))


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
        (lora_that_waits, UnsupportedError, "ALoraLinearVariant"),
        (vera, UnsupportedError, "vera"),
        (ADAPTED["loha"], UnsupportedError, "loha"),
        (adalora, UnsupportedError, "AdaLoRA"),
        (ADAPTED["lora on experts"], UnsupportedError, "ParamWrapper"),
        (experts_in_a_list, UnsupportedError, "experts"),
        (dora_with_biases, UnsupportedError, "DoRA"),
        (shared_between_layers, UnsupportedError, "share"),
        (unknown_parameter, UnsupportedError, "knob"),
        (
            lambda: get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            UnsupportedError,
            "PROMPT_TUNING",
        ),
        (lambda: tiny("llama").requires_grad_(False), AdapterError, "trainable"),
    ],
)
def test_what_is_refused(build, kind, words):
    model = build()
    with pytest.raises(kind, match=words):
        attach(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_what_is_not_tapped_under_compile(kind, whole):
    model = ADAPTED[kind]()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        group_by_layer(model)[1].module.compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"torch\.compile"):
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
    with attach(model, select=1), pytest.raises(UnsupportedError, match="packing"):
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
    with attach(model, select=1), pytest.raises(UnsupportedError, match="hidden states"):
        layer(torch.zeros(6, 32))


def test_pairs_of_an_odd_batch():
    model = adapted()
    with attach(model, select=1, pairs=True), pytest.raises(UnsupportedError, match="pairs"):
        model(**batch(model, 3))


def test_a_module_that_does_not_see_rows():
    model = adapted()
    module = model.base_model.model.model.layers[0].mlp.up_proj
    module.register_forward_pre_hook(lambda m, args: (args[0][:, :3].flatten(0, 1),))
    with attach(model, select=1), pytest.raises(UnsupportedError, match="shape"):
        model(**batch(model, 3))


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (ADAPTED["dora gpt2"], {Kind.LINEAR, Kind.FLATTENED}),
        (lambda: tiny("gpt2"), {Kind.TRANSPOSED, Kind.BIAS, Kind.NORM}),
        (lambda: tiny("qwen3"), {Kind.LINEAR, Kind.SCALE}),
    ],
)
def test_kinds(build, kinds):
    groups = group_by_layer(build())
    survey = Survey(groups)
    assert set(survey.kinds.values()) == kinds
    parameters = {p for group in groups for p in group.parameters.values()}
    tapped = {slot.parameter for uses in survey.tapped.values() for slot, _ in uses}
    assert tapped | set(survey.vectors) == parameters
    assert not tapped & set(survey.vectors)


@pytest.mark.parametrize("build", [vera, ADAPTED["loha"]], ids=["vera", "loha"])
def test_ist_and_rst_work_with_any_adapter_of_peft(build):
    model = build()
    inputs = batch(model, 3)
    for method in (IST(active=0.5, interval=1, score_batch_size=3), RST(active=0.5)):
        given = {"batches": [inputs]} if isinstance(method, IST) else {}
        with method.attach(model, **given) as sift:
            for _ in range(3):
                model.zero_grad()
                model(**inputs).loss.backward()
                for group in group_by_layer(model):
                    trains = any(p.grad is not None and bool(p.grad.any()) for p in group.parameters.values())
                    assert trains == (group.index in sift.last.layers)
                choice = sift.step()
            assert not isinstance(method, IST) or len(set(choice.losses)) > 1
