"""Parts of layers that run compiled do as they did: losses, gradients, names, and nothing is left."""

import shutil

import pytest
import torch
from support.adapted import adapted, shake
from support.tiny import batch, tiny
from torch import nn
from torch._dynamo.callback import callback_handler

from siftune.base.errors import UnsupportedError
from siftune.engine.compiled import CompiledParts
from siftune.engine.gate import LayerGates
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import as_one, use_base_dtype
from siftune.models.adapters.attach import attach_adapter
from siftune.models.layers import find_layers

TRACED = "eager"  # torch traces and guards what it would compile, and runs it by its own kernels


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, **options) -> CompiledParts:
    return CompiledParts(find_layers(model).layers, **{"backend": TRACED, **options})


def step(model: nn.Module, seed: int = 0, **size) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch."""
    model.zero_grad()
    loss = model(**batch(model, seed=seed, **size), use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours, theirs, tolerance):
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert float((ours[1][name] - gradient).abs().max()) <= tolerance * float(gradient.abs().max()), name


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.compiled)])
def test_gradients_are_those_of_eager_and_other_shapes_compile_nothing_anew(family):
    model = adapted(family).train().double()
    sizes = [{"rows": 3, "length": 7}, {"rows": 4, "length": 11}]
    eager = [step(model, seed, **size) for seed, size in enumerate(sizes)]
    names = list(model.state_dict())
    parts, graphs = compiled(model), []
    for seed, size in enumerate(sizes):
        assert_alike(step(model, seed, **size), eager[seed], 1e-10)
        graphs.append(parts.graphs)
    assert 0 < graphs[0] == graphs[1] <= 6  # not one for each of the layers
    assert parts.seconds > 0
    assert list(model.state_dict()) == names
    parts.remove()


@pytest.mark.compiled
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="torch needs a C++ compiler")
@pytest.mark.parametrize(("frozen", "graphs"), [(True, 1), (False, 3)], ids=["norms alone", "all"])
def test_inductor_with_checkpointing_and_float32_adapters_on_bfloat16(frozen, graphs):
    model = attach_adapter(tiny("llama", layers=2).bfloat16(), "lora", rank=4).train()
    for parameter in shake(model).parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    with use_base_dtype(model, group_by_layer(model)):
        eager = step(model)
    parts = compiled(model, frozen=frozen, backend="inductor")
    with use_base_dtype(model, group_by_layer(model)):
        ours = step(model)
    assert {gradient.dtype for gradient in ours[1].values()} == {torch.float32}
    assert_alike(ours, eager, 0.05)
    assert parts.graphs == graphs
    parts.remove()


@pytest.mark.compiled
def test_layers_that_do_not_train_get_no_gradient_and_others_that_of_eager():
    model = adapted("llama").train().double()
    groups = group_by_layer(model)
    parts = compiled(model)
    with LayerGates(model, groups) as gates:
        for active in ({1, 3}, {2}):
            gates.set_active(active)
            ours = step(model)
            assert parts.graphs <= 6  # what gates do to parameters breaks no part into pieces
            parts.remove()
            with_hooks_inside = adapted("llama").train().double()
            with LayerGates(with_hooks_inside, group_by_layer(with_hooks_inside)) as theirs:
                theirs.set_active(active)
                assert_alike(ours, step(with_hooks_inside), 1e-10)
            assert {int(name.split(".layers.")[1].split(".")[0]) for name in ours[1]} == active
            parts = compiled(model)
    parts.remove()


def test_where_hooks_look_into_what_trains_only_what_is_frozen_is_compiled():
    model = attach_adapter(tiny("llama"), "lora", rank=2, targets=["q_proj"])
    parts = compiled(model, frozen=True)
    for layer in find_layers(model).layers:
        has_own = {name for name, part in layer.named_children() if "forward" in vars(part)}
        assert has_own == {"mlp", "input_layernorm", "post_attention_layernorm"}
    parts.remove()


@pytest.mark.compiled
def test_passes_without_gradients_and_with_caches_run_as_ever():
    model = adapted("llama")
    parts = compiled(model)
    with torch.no_grad():
        model(**batch(model))
        model.generate(batch(model)["input_ids"][:1], max_new_tokens=2)
    assert parts.graphs == 0
    model(**batch(model), use_cache=True).loss.backward()
    assert parts.graphs == 2  # norms and MLPs
    parts.remove()


def test_nothing_is_left():
    model = adapted("llama").train()
    before = step(model)
    handlers = len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)
    parts = compiled(model)
    assert all(part in as_one for layer in find_layers(model).layers for part in layer.children())
    parts.remove()
    parts.remove()
    assert not any("forward" in vars(module) or module in as_one for module in model.modules())
    assert (len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)) == handlers
    assert_alike(step(model), before, 0)


def broken(*_):
    raise RuntimeError("No working C++ compiler found")


def test_where_torch_cannot_compile_is_an_error():
    model = adapted("llama").train()
    parts = compiled(model, backend=broken)
    with pytest.raises(UnsupportedError, match="compile"):
        step(model)
    parts.remove()


def test_parts_that_something_runs_already_are_refused():
    model = tiny("llama")
    model.model.layers[2].mlp.forward = lambda hidden: hidden
    with pytest.raises(UnsupportedError, match="LlamaMLP"):
        compiled(model)


def test_layers_of_many_shapes_are_refused():
    model = tiny("llama", layers=6)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.up_proj = nn.Linear(32, 40 + number)
    with pytest.raises(UnsupportedError, match="8"):
        compiled(model)
    assert not any("forward" in vars(module) for module in model.modules())
