"""Parameters step aside during a forward pass and come back as they were."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support.adapted import ADAPTED, adapted, shake
from support.tiny import batch, tiny
from torch import nn

from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import ForwardSubstitution, Substitution, parameter_owners, units, use_base_dtype
from siftune.models.adapters.attach import attach_adapter
from siftune.models.adapters.registry import ADAPTER_TYPES

SOME = ["lora patterns", "dora gpt2", "two adapters", "ia3", "parallel beside experts", "lora on experts"]


def held(model: nn.Module) -> dict[str, int]:
    """Identity of everything that modules hold as parameters."""
    return {f"{n}.{k}": id(p) for n, m in model.named_modules() for k, p in m._parameters.items()}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def bf16(family: str = "llama", kind: str = "lora", **settings):
    """A bfloat16 base with float32 adapters that respond."""
    return shake(attach_adapter(tiny(family).to(torch.bfloat16), kind, **{"rank": 4, **settings}))


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one batch."""
    model.zero_grad()
    out = model(**batch(model))
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# --- swap and restore


@pytest.mark.parametrize("name", SOME)
def test_owners_hold_every_parameter_of_the_group(name):
    model = ADAPTED[name]()
    for group in group_by_layer(model):
        owners = parameter_owners(group)
        assert {id(slot.parameter) for slot in owners} == {id(p) for p in group.parameters.values()}
        assert len(owners) == len(group.parameters)
        assert all(s.owner._parameters[s.name] is s.parameter and s.layer == group.index for s in owners)


def test_owners_of_a_parameter_that_two_modules_of_a_layer_hold():
    model = adapted()
    layer = group_by_layer(model)[0].module
    layer.mlp.up_proj.lora_A["default"].weight = layer.mlp.gate_proj.lora_A["default"].weight
    group = group_by_layer(model)[0]
    assert len(parameter_owners(group)) == len(group.parameters) + 1
    substitution = Substitution(group)
    substitution.swap(lambda _, p: p.detach())
    assert not any(p.requires_grad for m in layer.modules() for p in m._parameters.values() if p is not None)
    substitution.restore()
    assert parameter_owners(group)


@pytest.mark.parametrize("name", SOME)
def test_detached_layer_gets_no_gradient_and_computes_the_same(name):
    model = ADAPTED[name]()
    groups = group_by_layer(model)
    before, state = step(model)[0], held(model)
    substitution = Substitution(groups[2])
    substitution.swap(lambda _, p: p.detach())
    after, grads = step(model)
    assert torch.equal(before, after)
    assert not any(n.startswith(groups[2].name + ".") for n in grads)
    assert any(n.startswith(groups[1].name + ".") for n in grads)
    substitution.restore()
    assert held(model) == state
    assert any(n.startswith(groups[2].name + ".") for n in step(model)[1])


def test_nested_swaps_compose_and_unwind():
    group = group_by_layer(adapted())[0]
    state = held(group.module)
    _, module, name, parameter = parameter_owners(group)[0]
    outer, inner = Substitution(group), Substitution(group)
    outer.swap(lambda _, p: p.detach() + 1)
    shifted = held(group.module)
    inner.swap(lambda _, p: p * 3)
    inner.swap(lambda _, p: p.double())
    assert torch.equal(module._parameters[name], ((parameter.detach() + 1) * 3).double())
    inner.restore()
    inner.restore()
    assert held(group.module) == shifted
    outer.restore()
    assert held(group.module) == state
    outer.restore()
    assert held(group.module) == state


def test_restore_after_a_replacement_that_raises():
    group = group_by_layer(adapted())[0]
    state = held(group.module)
    substitution = Substitution(group)
    third = list(group.parameters.values())[2]

    def fail_at_third(_, current):
        if current is third:
            raise MemoryError
        return current.detach()

    with pytest.raises(MemoryError):
        substitution.swap(fail_at_third)
    assert held(group.module) != state
    substitution.restore()
    assert held(group.module) == state


@pytest.mark.parametrize("inner_first", [True, False])
def test_restore_all_in_any_order(inner_first):
    group = group_by_layer(adapted())[0]
    state = held(group.module)
    outer, inner = Substitution(group), Substitution(group)
    outer.swap(lambda _, p: p.detach())
    inner.swap(lambda _, p: p.double())
    for substitution in (inner, outer) if inner_first else (outer, inner):
        substitution.restore_all()
    assert held(group.module) == state


# --- in forward passes


def test_replace_is_told_the_layer_and_the_input_dtype():
    model = bf16()
    seen = set()
    with ForwardSubstitution(group_by_layer(model), lambda slot, p, x: seen.add((slot.layer, x.dtype)) or p):
        step(model)
    assert seen == {(index, torch.bfloat16) for index in range(4)}


@pytest.mark.parametrize("kind", SOME)
def test_every_parameter_of_a_layer_is_in_one_unit(kind):
    for group in group_by_layer(ADAPTED[kind]()):
        parts = units(group)
        found = [p for part in parts for p in part.parameters.values()]
        assert sorted(map(id, found)) == sorted(map(id, group.parameters.values()))
        for part in parts:
            assert part.index == group.index
            assert all(part.module.get_parameter(name) is p for name, p in part.parameters.items())


@pytest.mark.parametrize("kind", ["lora", "dora", "two adapters", "lora and dora", "ia3", "lora gpt2", "dora gpt2"])
def test_a_unit_is_an_adapted_module(kind):
    model = ADAPTED[kind]()
    expected = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    found = [unit.name for group in group_by_layer(model) for unit in units(group)]
    assert sorted(found) == sorted(expected)
    assert len(found) >= 4


def test_plain_parameters_are_units_by_their_module():
    (group,) = group_by_layer(tiny("llama", layers=1))
    assert "model.layers.0.input_layernorm" in {unit.name for unit in units(group)}
    assert all(len(unit.parameters) == 1 for unit in units(group))


def test_adapter_modules_are_hooked_once_each():
    model = bf16(kind="dora")
    tuners = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    with ForwardSubstitution(group_by_layer(model), lambda slot, p, x: p):
        assert all(len(m._forward_hooks) == len(m._forward_pre_hooks) == 1 for m in tuners)
        assert hooks(model) == 2 * len(tuners)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "lora"), ("gpt2", "dora"), ("gemma2", "lora"), ("bloom", "dora"), ("mixtral", "lora"), ("opt", "dora")],
)
def test_base_dtype_equals_peft_with_adapters_of_that_dtype(family, kind):
    model = bf16(family, kind)
    state = held(model)
    in_float32, _ = step(model)
    with use_base_dtype(model, group_by_layer(model)):
        logits, grads = step(model)
    assert held(model) == state
    assert hooks(model) == 0
    assert torch.equal(step(model)[0], in_float32)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    for name, module in model.named_modules():
        if name.endswith(("lora_A", "lora_B", "lora_magnitude_vector")):
            module.to(torch.bfloat16)
    expected, expected_grads = step(model)
    assert torch.equal(logits, expected)
    assert grads.keys() == expected_grads.keys()
    assert all(torch.equal(grads[n], g.float()) for n, g in expected_grads.items())
    assert 0 < (logits - in_float32).norm() < 0.05 * in_float32.norm()


@pytest.mark.parametrize("kind", ["dora", "ia3", "series"])
def test_new_parameters_train_on_a_half_precision_base(kind):
    model = bf16(kind=kind, rank=4 if "rank" in ADAPTER_TYPES[kind].keys else None)
    expected = step(model)[0]
    with use_base_dtype(model, group_by_layer(model)):
        logits, grads = step(model)
    assert logits.dtype == torch.bfloat16
    assert all(bool(torch.isfinite(grad).all()) for grad in grads.values())
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert (logits - expected).float().norm() < 0.1 * expected.float().norm()


def test_base_dtype_changes_nothing_in_float32():
    model = adapted()
    expected, expected_grads = step(model)
    with use_base_dtype(model, group_by_layer(model)):
        logits, grads = step(model)
    assert torch.equal(logits, expected)
    assert all(torch.equal(grads[n], g) for n, g in expected_grads.items())


@pytest.mark.parametrize(("kind", "reentrant"), [("lora", False), ("dora", True)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_base_dtype_with_activation_checkpointing(kind, reentrant):
    model = bf16(kind=kind, dropout=0.0).train()
    with use_base_dtype(model, group_by_layer(model)):
        expected, expected_grads = step(model)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        logits, grads = step(model)
        assert all(
            isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None
        )
    assert torch.equal(logits, expected)
    assert grads.keys() == expected_grads.keys()
    assert all(torch.equal(grads[n], g) for n, g in expected_grads.items())


def test_base_dtype_follows_the_input_under_no_grad():
    model = bf16()
    with use_base_dtype(model, group_by_layer(model)), torch.no_grad():
        out = model.generate(batch(model)["input_ids"][:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 9)


def test_base_dtype_outside_of_the_layers_and_outside_of_adapters():
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm", "input_layernorm"])
    model = shake(get_peft_model(tiny("llama").to(torch.bfloat16), config))
    trained = [m for n, m in model.named_modules() if n.endswith(("norm.modules_to_save.default", "lora_A.default"))]
    for module in trained:
        module.float()
    seen = set()
    with use_base_dtype(model, group_by_layer(model)):
        for module in trained:
            module.register_forward_pre_hook(lambda m, args: seen.add((type(m).__name__, m.weight.dtype)))
        _, grads = step(model)
    assert seen == {(name, torch.bfloat16) for name in ("LlamaRMSNorm", "Linear")}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert any("lm_head" in n for n in grads)
    assert any("model.norm.modules_to_save" in n for n in grads)


def test_base_dtype_leaves_vectors_that_begin_at_one():
    """A change of 0.003 is less than bfloat16 sees beside one; what is scaled by it shows it."""
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(tiny("llama").to(torch.bfloat16), config)
    begun = step(model)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.003 * parameter.requires_grad)
    expected = step(model)[0]
    assert not torch.equal(expected, begun)
    with use_base_dtype(model, group_by_layer(model)):
        logits, grads = step(model)
    assert torch.equal(logits, expected)
    assert {g.dtype for g in grads.values()} == {torch.float32}


def test_parameters_come_back_when_a_forward_fails():
    model = bf16()
    state = held(model)
    broken = group_by_layer(model)[1].module.mlp.up_proj.lora_B["default"]

    def fail(*_):
        raise RuntimeError("stop")

    broken.register_forward_hook(fail)
    with use_base_dtype(model, group_by_layer(model)):
        with pytest.raises(RuntimeError, match="stop"):
            step(model)
        assert held(model) == state


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_ctrl_c_in_a_forward():
    model = bf16()
    state, expected = held(model), step(model)[0]
    groups = group_by_layer(model)
    broken = groups[1].module.mlp.up_proj.lora_B["default"]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = use_base_dtype(model, groups)
    used = step(model)
    for _ in range(2):
        interrupting = broken.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(model)
        assert held(model) != state  # torch runs no hooks on the way out
        interrupting.remove()
        again = step(model)
        assert torch.equal(again[0], used[0])
        assert again[1].keys() == used[1].keys()
        assert held(model) == state
    broken.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model)
    broken._forward_hooks.clear()
    handle.remove()
    handle.remove()
    assert held(model) == state
    assert torch.equal(step(model)[0], expected)
