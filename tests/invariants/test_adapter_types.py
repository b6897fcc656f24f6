"""Adapter types with methods and model families: hand-picked pairs, each type, method and structure at least once.

The gradients of single rows are tested for every family in tests/unit/engine/test_tape.py. Here a step is tested.
"""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from support.adapted import base as plain
from support.adapted import shake
from support.every_method import attached
from support.oracles import gradients, row_of, sample_gradients, summed_loss
from support.rounded import rounded
from support.tiny import batch

from siftune.base.errors import AdapterError, UnsupportedError
from siftune.engine.groups import group_by_layer
from siftune.engine.suppression import suppress
from siftune.methods.dp.accounting import Mechanism
from siftune.methods.dp.driver import PrivateGradients
from siftune.methods.dp.secret import Secret
from siftune.models.adapters.attach import attach_adapter
from siftune.models.adapters.full import OpenLayers
from siftune.models.adapters.registry import ADAPTER_TYPES

ROUNDED = {"4 bits": 4, "8 bits": 8}  # llama, by bitsandbytes
PRIVATE = Mechanism(8.0, 1e-5, 1e9, rows=100, batch=1, steps=10, noise=0.0)


def base(family):
    if family in ROUNDED:
        pytest.importorskip("bitsandbytes")
        return rounded(ROUNDED[family])
    return plain(family)


def build(kind, family="llama", **settings):
    """A model with an adapter that responds, in float64 if the base has it."""
    model = base(family)
    if kind == "full":
        OpenLayers(model, None)
    else:
        rank = {"rank": 4} if "rank" in ADAPTER_TYPES[kind].keys else {}
        model = shake(attach_adapter(model, kind, **rank, **settings)).eval()
    # bitsandbytes has no float64; in eval mode its kernels differ with and without gradients
    return model.train() if family in ROUNDED else model.double()


def step(stack, model, method, inputs):
    """Run one backward pass with a method; return its choices."""
    if method == "dp":  # clipped at a norm that no row reaches, so that the sum is released
        driver = PrivateGradients(model, PRIVATE, Secret(0))
        stack.callback(driver.remove)
        summed_loss(model, inputs).backward()
        driver.release(0)
        return []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    methods = attached(stack, method, model, optimizer)
    summed_loss(model, inputs).backward()
    return [part.last for part in methods]


EXPERTS: dict[str, Any] = {"family": "mixtral", "targets": ["q_proj", "experts"]}
STEPS = [
    ("lora", "ist+gast", {}),
    ("lora", "ist", EXPERTS),
    ("lora", "gast", {"family": "4 bits"}),
    ("lora", "ist+gast", {"family": "8 bits"}),
    ("rslora", "rst", {}),
    ("dora", "gast", {"family": "gpt2"}),
    ("series", "ist+gast", {}),
    ("series", "gast", {"family": "mamba"}),
    ("parallel", "gast", {}),
    ("parallel", "dp", {"family": "mixtral"}),
    ("ia3", "ist", {}),
    ("ia3", "dp", {"family": "bloom"}),
    ("ln", "gast", {"family": "gemma2"}),
    ("ln", "rst", {}),
    ("full", "dp", {}),
    ("full", "ist", {}),
    ("full", "gast", {"family": "gpt2"}),
]


@pytest.mark.parametrize(("kind", "method", "settings"), STEPS)
def test_a_steps_gradients_are_those_of_the_chosen_rows_and_layers(kind, method, settings):
    """Each row's gradient comes from a pass of its own."""
    model = build(kind, **settings)
    bound = 1e-4 if settings.get("family") in ROUNDED else 1e-11
    inputs = batch(model, 4)
    single = sample_gradients(model, inputs)
    with ExitStack() as stack:
        choices = step(stack, model, method, inputs)
    groups = group_by_layer(model)
    layers = next((set(c.layers) for c in choices if not hasattr(c, "selected")), {g.index for g in groups})
    rows = next((c for c in choices if hasattr(c, "selected")), None)
    for group in groups:
        for parameter in group.parameters.values():
            if group.index not in layers:
                assert parameter.grad is None
                continue
            grads = single[parameter]
            if rows is not None:
                grads = grads[rows.selected[rows.layers.index(group.index)]] * len(grads) / rows.selected.shape[1]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            scale = max(float(single[parameter].abs().max()), 1e-3)
            assert float((gradient - grads.sum(0)).abs().max()) <= bound * scale


@pytest.mark.parametrize(
    ("kind", "method", "settings", "error", "word"),
    [
        ("lora", "gast", EXPERTS, UnsupportedError, "experts"),
        ("full", "gast", {"family": "mixtral"}, UnsupportedError, "experts"),
        ("full", "gast", {"family": "4 bits"}, AdapterError, "cannot train"),
        ("dora", "gast", {"family": "8 bits"}, AdapterError, "dora"),
    ],
)
def test_a_pair_that_cannot_work_is_refused(kind, method, settings, error, word):
    with ExitStack() as stack, pytest.raises(error, match=word):
        attached(stack, method, build(kind, **settings), None)


def test_prefix_tuning_trains_densely_and_its_layers_cannot_be_chosen():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(plain("llama"), config)
    summed_loss(model, batch(model, 2)).backward()
    with pytest.raises(UnsupportedError, match="PREFIX_TUNING"):
        group_by_layer(model)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("lora", "4 bits"),
        ("dora", "gpt2"),
        ("series", "mamba"),
        ("parallel", "mixtral"),
        ("ia3", "bloom"),
        ("ln", "opt"),
    ],
)
def test_damped_to_nothing_a_model_is_its_base(kind, family):
    model = build(kind, family)
    inputs = {name: value for name, value in batch(model, 4).items() if name != "labels"}
    reference = base(family)
    reference = reference.train() if family in ROUNDED else reference.double()
    with torch.no_grad():
        expected, tuned = reference(**inputs).logits, model(**inputs).logits
        with suppress(group_by_layer(model), range(4), 0.0):
            damped = model(**inputs).logits
    bound = 1e-2 if family in ROUNDED else 1e-9
    assert float((tuned - expected).abs().max()) > 10 * bound
    torch.testing.assert_close(damped, expected, rtol=bound, atol=bound)


def test_the_sum_over_rows_is_the_gradient():
    """The oracle itself."""
    model = build("dora")
    inputs = batch(model, 3)
    total, rows = gradients(model, inputs), sample_gradients(model, inputs)
    assert row_of(inputs, 1)["input_ids"].shape[0] == 1
    for parameter, grad in total.items():
        torch.testing.assert_close(rows[parameter].sum(0), grad, rtol=1e-9, atol=1e-11)
