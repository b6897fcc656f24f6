"""Gates: gradients against plain autograd, what backward touches, what is left behind."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapted import checkpoint_whole_layers, looped
from support.tiny import FAMILIES, batch, tiny

from siftune.engine.gate import LayerGates, nothing_trains_before
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.models.adapters.attach import attach_adapter


def adapted(family="llama", layers=4, **settings):
    """A tiny model whose adapters respond: PEFT starts B at zero."""
    model = attach_adapter(tiny(family, layers), rank=4, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def grads(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "lora") for family in FAMILIES), ("llama", "dora"), ("gpt2", "dora"), ("mixtral", "rslora")],
)
def test_active_layers_get_plain_gradients_and_others_none(family, kind):
    model = adapted(family, kind=kind)
    inputs = batch(model)
    groups = group_by_layer(model)
    plain = grads(model, inputs)
    with LayerGates(model, groups) as gates:
        gates.set_active([1, 3])
        gated = grads(model, inputs)
    for group in groups:
        for name in group.parameters:
            full = f"{group.name}.{name}"
            if group.index in (1, 3):
                assert torch.equal(gated[full], plain[full]), full
            else:
                assert gated[full] is None, full


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_activation_checkpointing_changes_nothing(checkpointing):
    model = adapted()
    inputs = batch(model)
    groups = group_by_layer(model)
    with LayerGates(model, groups) as gates:
        gates.set_active([2])
        expected = grads(model, inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
        model.train()
        got = grads(model, inputs)
    assert any(g is not None for g in expected.values())
    for name, grad in expected.items():
        assert (grad is None) == (got[name] is None), name
        if grad is not None:
            torch.testing.assert_close(got[name], grad)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_may_run_a_layers_hooks_again(monkeypatch, reentrant, zeros):
    model = adapted()
    if reentrant:
        model.enable_input_require_grads()
    inputs = batch(model)
    with LayerGates(model, group_by_layer(model), deliver_zeros=zeros) as gates:
        gates.set_active([1, 3])
        expected = grads(model, inputs)
        checkpoint_whole_layers(model, monkeypatch, reentrant)
        got = grads(model, inputs)
    trained = {name: grad for name, grad in got.items() if grad is not None and (not zeros or grad.any())}
    assert {name.split(".layers.")[1][0] for name in trained} == {"1", "3"}
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad)


@pytest.mark.parametrize("active", [[1], [2], [1, 3], [0, 2]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loop_over_layers_gets_plain_gradients(active, checkpointing):
    model = looped()
    inputs = batch(model)
    plain = grads(model, inputs)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    with LayerGates(model, group_by_layer(model)) as gates:
        gates.set_active(active)
        got = grads(model, inputs)
    for name, grad in got.items():
        if int(name.split(".layers.")[1][0]) in active:
            torch.testing.assert_close(grad, plain[name])
        else:
            assert grad is None


def saved_bytes(model, inputs):
    """Bytes that autograd keeps between forward and backward, without the parameters themselves."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    del loss
    return sum(kept.values())


def layer_saves(model, inputs, index):
    """Number of tensors that autograd saves while layer `index` runs."""
    group = group_by_layer(model)[index]
    count, inside = [0], [False]
    handles = [
        group.module.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        group.module.register_forward_hook(lambda *_: inside.__setitem__(0, False)),
    ]

    def pack(tensor):
        count[0] += inside[0]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    for handle in handles:
        handle.remove()
    return count[0]


@pytest.mark.parametrize("input_grads", [False, True])
def test_backward_ends_at_the_lowest_active_layer(input_grads):
    model = adapted()
    if input_grads:  # as transformers does for activation checkpointing
        model.enable_input_require_grads()
    inputs = batch(model)
    groups = group_by_layer(model)
    seen = {}
    for group in groups:
        group.module.register_forward_hook(
            lambda _, __, output, index=group.index: seen.__setitem__(index, output.requires_grad)
        )
    with LayerGates(model, groups) as gates:
        gates.set_active([2])
        model(**inputs)
        assert seen == {0: False, 1: False, 2: True, 3: True}
        assert [layer_saves(model, inputs, index) for index in (0, 1)] == [0, 0]


def test_nothing_is_saved_for_inactive_adapters_above():
    model = adapted()
    inputs = batch(model, rows=4, length=16)
    groups = group_by_layer(model)
    frozen = copy.deepcopy(model)  # layer 0 alone has adapters: the least that its backward needs
    for group in group_by_layer(frozen)[1:]:
        for parameter in group.parameters.values():
            parameter.requires_grad_(False)
    with LayerGates(model, groups) as gates:
        gates.set_active([0])
        assert saved_bytes(model, inputs) == saved_bytes(frozen, inputs)
    assert saved_bytes(model, inputs) > saved_bytes(frozen, inputs)


@pytest.mark.parametrize("embeddings", [False, True])  # which train, so that backward continues below the lowest layer
def test_zeros_are_delivered_where_a_reducer_waits(embeddings):
    model = adapted()
    model.get_input_embeddings().weight.requires_grad_(embeddings)
    inputs = batch(model)
    groups = group_by_layer(model)
    plain = grads(model, inputs)
    with LayerGates(model, groups, deliver_zeros=True) as gates:
        gates.set_active([1])
        got = grads(model, inputs)
        assert all(g is not None for g in got.values())
        for group in groups:
            for name in group.parameters:
                full = f"{group.name}.{name}"
                expected = plain[full] if group.index == 1 else torch.zeros_like(plain[full])
                assert torch.equal(got[full], expected)
        gates.drop_inactive_grads()
        kept = {name for name, p in model.named_parameters() if p.grad is not None and ".layers." in name}
    assert kept == {f"{groups[1].name}.{name}" for name in groups[1].parameters}


def test_trainable_embeddings_keep_their_gradient():
    model = get_peft_model(
        tiny("llama"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"),
    )
    groups = group_by_layer(model)
    assert not nothing_trains_before(model, groups)
    with LayerGates(model, groups) as gates:
        gates.set_active([3])
        got = grads(model, batch(model))
    embeddings = [g for name, g in got.items() if "embed_tokens" in name]
    assert embeddings
    assert all(g is not None for g in embeddings)


def test_a_trainable_head_does_not_stop_the_cut():
    model = get_peft_model(
        tiny("llama", tie_word_embeddings=False),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )
    assert nothing_trains_before(model, group_by_layer(model))


def snapshot(model):
    return {
        name: (
            id(module), type(module), module.forward.__func__, len(module._forward_hooks),
            len(module._forward_pre_hooks), {n: id(p) for n, p in module._parameters.items()},
            {n: p.requires_grad for n, p in module._parameters.items() if p is not None},
        )
        for name, module in model.named_modules()
    }  # fmt: skip


def test_removal_leaves_the_model_as_it_was():
    model = adapted()
    before = snapshot(model)
    gates = LayerGates(model, group_by_layer(model))
    gates.set_active([0])
    model(**batch(model)).loss.backward()
    assert snapshot(model) != before
    gates.remove()
    gates.remove()
    assert snapshot(model) == before
    alive = weakref.ref(gates)
    del gates
    gc.collect()
    assert alive() is None


def test_gates_and_base_dtype_nest():
    model = adapted().to(torch.bfloat16)
    groups = group_by_layer(model)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.data = parameter.data.float()
    inputs = batch(model)
    outer = use_base_dtype(model, groups)
    expected = grads(model, inputs)
    with LayerGates(model, groups) as gates:
        gates.set_active([2])
        got = grads(model, inputs)
    outer.remove()
    names = [f"{groups[2].name}.{name}" for name in groups[2].parameters]
    assert all(got[name].dtype == torch.float32 for name in names)
    assert all(torch.equal(got[name], expected[name]) for name in names)
    assert sum(g is not None for g in got.values()) == len(names)
    assert all(p.dtype == torch.float32 for group in groups for p in group.parameters.values())
