"""LoRA-drop against responses that are computed by hand, and its choices by hand."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.adapted import two_active_adapters
from support.carriers_table import build
from support.tiny import batch, tiny
from support.trainers import adapted, train

from siftune import IST, LoRADrop
from siftune.base.errors import AdapterError, RecipeError, TrainingError
from siftune.engine.groups import group_by_layer
from siftune.engine.responses import measured_responses
from siftune.methods.drivers.layer_driver import LayerStack
from siftune.methods.loradrop import maths
from siftune.methods.loradrop.callback import RespondingLayers
from siftune.methods.loradrop.settings import LoRADropSettings
from siftune.models.adapters.attach import attach_adapter
from siftune.models.adapters.full import OpenLayers

SHARES = st.lists(st.integers(0, 20), min_size=1, max_size=7).map(
    lambda parts: torch.tensor(parts, dtype=torch.float64)
)


def by_hand(model, inputs):
    """‖scale·B A x‖² of every layer, from the inputs of its modules, token by token that attention sees."""
    found, handles = {}, []
    mask = inputs["attention_mask"].bool()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer = int(name.split(".layers.")[1].split(".")[0])

            def look(module, args, layer=layer):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                for x in args[0][mask]:
                    found[layer] = found.get(layer, 0.0) + float((module.scaling["default"] * b @ (a @ x)).pow(2).sum())

            handles.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.tensor([found[layer] for layer in sorted(found)], dtype=torch.float64)


def measured(model, inputs):
    with torch.no_grad(), measured_responses(group_by_layer(model)) as responses:
        responses.seen = inputs["attention_mask"]
        model(**inputs)
    return responses.squares_L


def test_responses_are_those_of_b_a_x_without_padding():
    model = adapted().double().eval()
    inputs = batch(model, 5)
    torch.testing.assert_close(measured(model, inputs), by_hand(model, inputs), rtol=1e-12, atol=0)
    assert all(not module._forward_hooks for module in model.modules())


def test_on_bfloat16_responses_far_below_the_rounding_of_outputs_are_seen():
    model = adapted().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-3
    inputs, model = batch(model, 5), model.bfloat16()
    found = measured(model, inputs)
    torch.testing.assert_close(found, by_hand(model.double(), inputs), rtol=0.05, atol=0)


def test_responses_of_two_adapters_are_added_up_before_they_are_squared():
    model = two_active_adapters().double()
    inputs = batch(model, 3)
    seen, wanted = inputs["attention_mask"].bool(), torch.zeros(4, dtype=torch.float64)

    def look(layer, module, args, output):
        wanted[layer] += (output - module.base_layer(*args))[seen].square().sum()

    for group in group_by_layer(model):
        for module in (m for m in group.module.modules() if hasattr(m, "base_layer")):
            module.register_forward_hook(partial(look, group.index))
    torch.testing.assert_close(measured(model, inputs), wanted, rtol=1e-9, atol=0)


def test_an_adapter_that_began_as_a_part_of_the_base_is_refused():
    model = attach_adapter(tiny("llama"), rank=2, init="pissa")
    for method in (LoRADrop(), IST()):
        with pytest.raises(AdapterError, match="that began with pissa holds a part of the base"):
            method.attach(model, batches=[batch(model)])
    IST(interval=None).attach(model, batches=[batch(model)]).remove()


@pytest.mark.parametrize("kind", ["series", "oft"])
def test_whatever_adapter_it_is_a_response_is_what_the_module_gives_beyond_its_base(kind):
    model, layers = build(kind).double(), {}
    inputs = batch(model, 3)
    seen = inputs["attention_mask"].bool()

    def look(layer, module, args, kwargs, output):
        base = module.base_layer(*args, **kwargs)
        change = _first(output) - _first(base)
        layers[layer] = layers.get(layer, 0.0) + sum(float(token @ token) for token in change[seen])

    for group in group_by_layer(model):
        for module in (m for m in group.module.modules() if hasattr(m, "base_layer")):
            module.register_forward_hook(partial(look, group.index), with_kwargs=True)
    found = measured(model, inputs).tolist()
    assert found == pytest.approx([layers[layer] for layer in sorted(layers)], rel=1e-10)
    assert min(found) > 0


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def test_a_layer_whose_adapter_is_zero_responds_with_zero():
    model = adapted(kind="dora").double().eval()
    for name, parameter in model.named_parameters():
        if ".layers.2." in name and "lora_B" in name:
            parameter.data.zero_()
    responses = measured(model, batch(model, 3))
    assert responses[2] < 1e-12 * responses.sum()  # DoRA's magnitude was a float32
    assert all(responses[layer] > 0 for layer in (0, 1, 3))


@given(SHARES, st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]))
def test_the_fewest_layers_that_have_the_share_are_kept(responses, threshold):
    shares = maths.importance(responses)
    assert float(shares.sum()) == pytest.approx(1.0)
    kept = maths.by_threshold(shares, threshold).tolist()
    if threshold == 1:
        assert kept == list(range(len(responses)))
        return
    assert float(shares[kept].sum()) >= threshold - 1e-9
    for others in itertools.combinations(range(len(responses)), len(kept) - 1):
        assert float(shares[list(others)].sum()) < threshold + 1e-9
    assert maths.by_count(shares, len(kept)).tolist() == kept


@pytest.mark.parametrize(("settings", "count"), [({"active": 1}, 1), ({"active": 0.5}, 2), ({"threshold": 0.01}, 1)])
def test_all_layers_train_at_first_and_then_those_that_respond_most(tmp_path, settings, count):
    drop, choices = LoRADrop(select_after=2, score_rows=4, **settings), []
    drop.on_select = choices.append
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 20.0 if ".layers.1." in name else 5.0 if ".layers.3." in name else 0.1
    train(tmp_path, drop, model=model, max_steps=5, learning_rate=1e-5)
    assert [choice.layers for choice in choices] == [(0, 1, 2, 3)] * 2 + [(1, 3)[:count]] * 3


def test_a_plain_loop_needs_rows_and_every_layer_an_adapter():
    model = adapted()
    with pytest.raises(RecipeError, match=r"give attach\(\.\.\., batches=\.\.\.\)"):
        LoRADrop().attach(model)
    with LoRADrop(select_after=1, active=2).attach(model, batches=[batch(model)]) as sift:
        assert sift.last.layers == (0, 1, 2, 3)
        assert len(sift.step().layers) == 2
    opened = tiny("llama")
    OpenLayers(opened, (1, 2))
    with pytest.raises(AdapterError, match="no PEFT adapter whose response could be damped or measured"):
        LoRADrop().attach(opened, batches=[batch(opened)])


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_responses_that_are_not_finite_end_the_run(wrong):
    policy = RespondingLayers(LayerStack((0, 1), 2), LoRADropSettings())
    with pytest.raises(TrainingError, match="layer 1 answers LoRA-drop's rows with numbers that are not finite"):
        policy.note_responses(torch.tensor([1.0, wrong]))
