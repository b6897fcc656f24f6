"""Full layers: trainable and frozen parameters, dtypes, and the response."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.adapted import adapted
from support.tiny import FAMILIES, batch, logits, tiny
from torch import nn

from siftune.base.errors import AdapterError, LayerError
from siftune.engine.groups import group_by_layer, outside
from siftune.engine.substitution import use_base_dtype
from siftune.engine.suppression import suppress
from siftune.models.adapters.full import OpenLayers
from siftune.models.layers import find_layers, layer_numbers
from siftune.models.modules import expert_banks


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change what trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


# --- numbers


@given(st.integers(1, 40), st.data())
def test_numbers_are_those_of_a_list(depth, data):
    chosen = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1))
    everything = list(range(depth))
    assert list(layer_numbers(depth, chosen)) == sorted({everything[number] for number in chosen})


@pytest.mark.parametrize(("layers", "found"), [((4,), "4"), ((0, -5), "-5"), ((), "none")])
def test_numbers_that_are_not_there(layers, found):
    with pytest.raises(LayerError, match=found):
        layer_numbers(4, layers)


# --- opening


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_chosen_layers_train_and_in_float32(family):
    model = tiny(family).to(torch.bfloat16)
    before, names = logits(model), list(model.state_dict())
    values = copy.deepcopy(model.state_dict())
    opened = OpenLayers(model, (0, -1))
    path = find_layers(model).path
    inside = (f"{path}.0.", f"{path}.3.")
    assert opened.numbers == (0, 3)
    assert set(opened.parameters) == {n for n, _ in model.named_parameters() if n.startswith(inside)}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(inside), name
        assert parameter.dtype == (torch.float32 if name.startswith(inside) else torch.bfloat16), name
    groups = group_by_layer(model)
    assert [group.index for group in groups] == [0, 3]
    assert not outside(model, groups)
    with use_base_dtype(model, groups):
        assert torch.equal(logits(model), before)  # the base's dtype in every product
        model(**batch(model)).loss.backward()
    experts = {id(p) for group in groups for bank in expert_banks(group.module) for p in bank.parameters()}
    for name, parameter in opened.parameters.items():
        assert parameter.grad is not None or id(parameter) in experts, name  # an expert may see no token
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    opened.close()
    opened.close()
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), before)


def test_adapters_and_quantised_weights_are_refused():
    with pytest.raises(AdapterError, match="PeftModelForCausalLM has adapters already"):
        OpenLayers(adapted(), (0,))
    model = tiny("llama")
    weight = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[2].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(AdapterError, match=r"layers\.2\.self_attn\.q_proj\.weight is kept as int8"):
        OpenLayers(model, (1, 2))
    assert all(p.requires_grad for p in model.model.layers[0].parameters())  # nothing was changed
    with pytest.raises(LayerError, match="the model has 4 layers"):
        OpenLayers(model, (4,))


# --- the response


def linear_in_its_weights(module: nn.Module) -> bool:
    return bool(module._parameters) and not list(module.children())


@pytest.mark.parametrize(
    ("family", "factor"),
    [("llama", 0.0), ("llama", 1.0), *((family, 0.25) for family in ("llama", "gpt2", "opt", "gemma2"))],
)
def test_the_response_of_a_layer_is_damped(family, factor):
    """Module by module: base + factor·(output − base), with the base's module on the same input."""
    base = tiny(family).double()
    model = copy.deepcopy(base)
    OpenLayers(model, (0, 1, -1))
    moved(model)
    groups = group_by_layer(model)
    held = [id(p) for p in model.parameters()]
    with suppress(groups, [0, 2], factor):
        found = logits(model)
    assert [id(p) for p in model.parameters()] == held

    hooks = []
    for number in (0, 3):
        layer, original = find_layers(model).layers[number], find_layers(base).layers[number]
        for name, module in layer.named_modules():
            if linear_in_its_weights(module):
                twin = original.get_submodule(name)
                hooks.append(
                    module.register_forward_hook(
                        lambda _, args, out, twin=twin: twin(*args) + factor * (out - twin(*args))
                    )
                )
    assert len(hooks) >= 12
    wanted = logits(model)
    for hook in hooks:
        hook.remove()
    tolerance = 1e-5 if "gemma" in family else 1e-10  # Gemma's norms multiply in float32
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(found, logits(model)) == (factor == 1.0)


def test_factor_0_is_the_base_in_half_precision_too():
    model = tiny("llama").to(torch.bfloat16)
    before = logits(model)
    opened = OpenLayers(model, (0, 1, 2, 3))
    moved(model)
    groups = group_by_layer(model)
    with use_base_dtype(model, groups):
        assert not torch.equal(logits(model), before)
        with suppress(groups, range(4), 0.0):
            assert torch.equal(logits(model), before)
    opened.close()
    with pytest.raises(AdapterError, match="has no PEFT adapter"), suppress(groups, [0], 0.0):
        pass


def test_without_originals_the_response_is_not_known():
    model = tiny("llama")
    OpenLayers(model, (1,), originals=False)
    groups = group_by_layer(model)
    message = r"model\.layers\.1 has no PEFT adapter .*OpenLayers"
    with pytest.raises(AdapterError, match=message), suppress(groups, [0], 0.5):
        pass
