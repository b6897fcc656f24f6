"""Damping of adapters' response against an oracle, and that it leaves no trace."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from support.adapted import ADAPTED, adapted, from_config, two_active_adapters
from support.tiny import batch, logits, tiny
from torch import nn

from siftune.base.errors import AdapterError
from siftune.engine.groups import group_by_layer
from siftune.engine.suppression import suppress
from siftune.models.layers import find_layers


@contextmanager
def oracle(groups, indices, factor: float) -> Iterator[None]:
    """Damp by replacing forward methods: each adapted module adds factor·(own output − copied base's output)."""
    wrapped = []
    for index in indices:
        for module in groups[index].module.modules():
            if isinstance(module, BaseTunerLayer):
                base = copy.deepcopy(module.get_base_layer())

                def forward(*args, original=module.forward, base=base, **kwargs):
                    plain = base(*args, **kwargs)
                    return plain + factor * (original(*args, **kwargs) - plain)

                module.forward = forward
                wrapped.append(module)
    yield
    for module in wrapped:
        del module.forward


def snapshot(model: nn.Module) -> dict:
    """Everything that damping may touch."""
    modules = dict(model.named_modules())
    return {
        "scaling": {n: dict(m.scaling) for n, m in modules.items() if isinstance(getattr(m, "scaling", 0), dict)},
        "hooks": {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in modules.items()},
        "parameters": {n: id(p) for n, p in model.named_parameters()},
    }


@pytest.mark.parametrize("name", ADAPTED)
@settings(max_examples=8)
@given(indices=st.sets(st.integers(0, 3)), factor=st.sampled_from([0.0, 0.25, 0.7, 1.0, 2.0]))
def test_suppress_equals_the_oracle(models, name, indices, factor):
    model = models(name)
    groups = group_by_layer(model)
    before, state = logits(model), snapshot(model)
    with suppress(groups, indices, factor):
        damped = logits(model)
    with oracle(groups, indices, factor):
        expected = logits(model)
    assert torch.allclose(damped, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(damped, before) == (not indices or factor == 1)
    assert snapshot(model) == state
    assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def models():
    """Build each adapted model once, in float64."""
    built = {}

    def get(name: str) -> nn.Module:
        if name not in built:
            built[name] = ADAPTED[name]().double()
        return built[name]

    return get


@pytest.mark.parametrize("name", ["lora patterns", "dora", "lora and dora"])
def test_suppress_restores_after_an_error(models, name):
    model = models(name)
    state = snapshot(model)
    groups = group_by_layer(model)
    damping = suppress(groups, [0, 2], 0.1)
    damping.__enter__()
    assert snapshot(model) != state
    error = RuntimeError("stop")
    assert not damping.__exit__(type(error), error, None)
    assert snapshot(model) == state


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_without_adapters_on_routers_the_model_is_its_base(family):
    """They are adapted by all-linear, too, and return their choice of experts beside its logits."""
    model = from_config(LoraConfig(r=2, target_modules="all-linear"), family).double()
    groups = group_by_layer(model)
    with model.disable_adapter():
        wanted = logits(model)
    with suppress(groups, range(len(groups)), 0.0):
        found = logits(model)
    torch.testing.assert_close(found, wanted)
    assert float((logits(model) - wanted).abs().max()) > 0.1


def test_suppress_restores_scales_that_products_would_not():
    model = adapted()
    module = find_layers(model).layers[0].mlp.up_proj
    module.scaling["default"] = 0.1 + 0.2
    with suppress(group_by_layer(model), [0, 0], 0.3):  # twice the same layer is once
        assert module.scaling["default"] == (0.1 + 0.2) * 0.3
    assert module.scaling["default"] == 0.1 + 0.2


def test_suppress_leaves_inactive_adapters_and_other_layers_alone():
    model = two_active_adapters()
    model.base_model.set_adapter("second")
    groups = group_by_layer(model)
    first, other = (groups[i].module.self_attn.q_proj for i in (0, 1))
    with suppress(groups, [0], 0.5):
        assert first.scaling == {"default": 1.0, "second": 2.25}
        assert other.scaling == {"default": 1.0, "second": 4.5}


def test_suppress_positions_count_groups():
    model = adapted()
    for parameter in find_layers(model).layers[0].parameters():
        parameter.requires_grad_(False)
    groups = group_by_layer(model)
    assert groups[0].index == 1
    with suppress(groups, [0], 0.5):
        assert groups[0].module.mlp.up_proj.scaling["default"] == 1.0


def test_suppress_needs_peft_adapters():
    groups = group_by_layer(tiny("llama"))
    with pytest.raises(AdapterError, match=r"layers\.2"), suppress(groups, [2], 0.5):
        pass


def test_suppress_refuses_merged_adapters():
    model = adapted(targets=["q_proj", "v_proj"])
    groups = group_by_layer(model)
    model.merge_adapter()
    state = snapshot(model)
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        suppress(groups, [1], 0.5).__enter__()
    assert snapshot(model) == state


def test_gradients_flow_through_a_damped_dora():
    model = adapted(kind="dora")
    groups = group_by_layer(model)
    with suppress(groups, [1], 0.25):
        model(**batch(model)).loss.backward()
    damped = [p.grad.clone() for p in groups[1].parameters.values()]
    model.zero_grad()
    with oracle(groups, [1], 0.25):
        model(**batch(model)).loss.backward()
    for grad, parameter in zip(damped, groups[1].parameters.values(), strict=True):
        assert torch.allclose(grad, parameter.grad, atol=1e-6)
