"""Every cell of the tables in docs/carriers.md, tried on tiny models."""

from contextlib import ExitStack

import pytest
import torch
from support import carriers_table
from support.carriers_table import (
    AGAIN,
    BASES,
    CLOSED,
    COLUMNS,
    KINDS,
    ROUNDED,
    WORKS,
    build,
    exactly,
    on_family,
    with_method,
)
from support.every_method import attached
from support.oracles import gradients, row_of, sample_gradients, summed_loss
from support.tiny import batch

from siftune.base.errors import InputError
from siftune.engine.groups import group_by_layer
from siftune.engine.suppression import suppress
from siftune.methods.dp.driver import PrivateGradients
from siftune.methods.dp.mechanism import Mechanism
from siftune.methods.dp.sampling import Secret
from siftune.methods.drivers.sample_choice import WHOLE
from siftune.models.adapters.registry import CARRIERS

RUNS = (CLOSED, AGAIN, WORKS)
PRIVATE = Mechanism(8.0, 1e-5, 1e9, "layer", rows=100, batch=1, steps=10, noise=0.0)


def test_the_page_shows_what_is_declared():
    assert carriers_table.shown() == carriers_table.tables()


def needs_bitsandbytes(name):
    if any(bits in name for bits in ROUNDED):
        pytest.importorskip("bitsandbytes")


@pytest.mark.matrix
@pytest.mark.parametrize("method", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_with_a_method(kind, method):
    """The gradients of one step are those of the rows and layers that were chosen, each from a pass of its own."""
    needs_bitsandbytes(kind)
    (model, bound), verdict = exactly(kind), with_method(kind, method)
    inputs = batch(model, 4)
    with ExitStack() as stack:
        if verdict not in RUNS:
            stack.enter_context(pytest.raises(InputError, match=verdict))
        if kind == "prefix tuning":  # its own parameters are outside of the layers
            _ = group_by_layer(model) if method != "dense" else summed_loss(model, inputs).backward()
            return
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9)
        single = sample_gradients(model, inputs)
        choices = step(stack, model, method, inputs, optimizer)
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
                    unit = rows.layers.index(WHOLE if WHOLE in rows.layers else group.index)
                    grads = grads[rows.selected[unit]] * len(grads) / rows.selected.shape[1]
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                scale = max(float(single[parameter].abs().max()), 1e-3)
                assert float((found - grads.sum(0)).abs().max()) <= bound * scale


def step(stack, model, method, inputs, optimizer):
    """One backward pass with a method, and what it chose."""
    if method == "dense":
        summed_loss(model, inputs).backward()
        return []
    if method == "dp":  # clipped at a norm that no row has: what is released is the sum
        driver = PrivateGradients(model, PRIVATE, Secret(0))
        stack.callback(driver.remove)
        summed_loss(model, inputs).backward()
        driver.release(0)
        return []
    methods = attached(stack, method, model, optimizer)
    if method == "trim":  # it looks at the labels that the model is given
        summed_loss(lambda **_: model(**inputs), inputs).backward()
    else:
        summed_loss(model, inputs).backward()
    return [part.last for part in methods]


def attach(kind, family):
    with ExitStack() as stack:
        attached(stack, "gast", build(kind, family), None)


@pytest.mark.matrix
@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("kind", [*CARRIERS, "full"])
def test_a_kind_on_a_family(kind, family):
    """With GAST every layer follows the rows that were chosen; damped to nothing, the model is its base."""
    needs_bitsandbytes(family)
    verdict = on_family(kind, family)
    if verdict not in RUNS:
        with pytest.raises(InputError, match=verdict):
            attach(kind, family)
        return
    model, bound = exactly(kind, family)
    inputs = batch(model, 4)
    single = sample_gradients(model, inputs)
    with ExitStack() as stack:
        [choice] = step(stack, model, "gast", inputs, None)
    for group, selected in zip(group_by_layer(model), choice.selected, strict=True):
        for parameter in group.parameters.values():
            wanted = single[parameter][selected].sum(0) * len(single[parameter]) / len(selected)
            scale = max(float(single[parameter].abs().max()), 1e-3)
            assert float((parameter.grad - wanted).abs().max()) <= bound * scale
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad(), suppress(group_by_layer(model), range(4), 0.0):
        damped = model(**plain).logits
    with torch.no_grad():
        base = carriers_table.base(family)
        expected = (base.train() if family in ROUNDED else base.double())(**plain).logits
    torch.testing.assert_close(damped, expected, rtol=100 * bound, atol=100 * bound)


def test_the_sum_over_rows_is_the_gradient():
    """The oracle itself."""
    model = build("oft").double()
    inputs = batch(model, 3)
    whole, rows = gradients(model, inputs), sample_gradients(model, inputs)
    assert row_of(inputs, 1)["input_ids"].shape[0] == 1
    for parameter, grad in whole.items():
        torch.testing.assert_close(rows[parameter].sum(0), grad, rtol=1e-9, atol=1e-11)
