"""Distillation of compressed layers: against a plain loop, and what it leaves alone."""

import copy

import pytest
import torch
from support.emulators import FAMILIES, base, calibration, emulator, logits, settings

from siftune.base.errors import RecipeError
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator import distil
from siftune.offsite.emulator.make import emulators
from siftune.offsite.maths.drd import canonical

STEPS = 7


def through(model, batches, number):
    """What goes into a layer and comes out of it, and how it is called, by batch."""
    seen = []
    layer = find_layers(model).layers[number]
    handle = layer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        for inputs in batches:
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    handle.remove()
    return seen


def error(out, wanted, real):
    return ((out - wanted)[real].square().sum(-1) / wanted[real].square().sum(-1)).mean()


@pytest.mark.parametrize("number", [1, 3])
def test_steps_are_those_of_a_plain_loop(number):
    """Adam written down from its paper, on the finished emulator's own layers below."""
    model = base()
    batches = calibration(model, count=3)
    trained = emulator(model, batches, keep=0.5, distil=STEPS)
    start = emulator(model, batches, keep=0.5)
    layer = copy.deepcopy(find_layers(start).layers[number])
    family, inputs = family_of(model.config), through(trained, batches, number)
    wanted = [out for _, _, out in through(model, batches, number)]
    names = [f"{path}.{side}.weight" for path in family.attention for side in ("down", "up")]
    names.append(f"{family.writes}.weight")
    weights = [layer.get_parameter(name).requires_grad_() for name in names]
    rates = [3e-3 * weight.detach().square().mean().sqrt() for weight in weights]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(STEPS):
        args, kwargs, _ = inputs[step % 3]
        real = batches[step % 3]["attention_mask"].bool()
        grads = torch.autograd.grad(error(layer(*args, **kwargs), wanted[step % 3], real), weights)
        with torch.no_grad():
            for weight, rate, grad, m, v in zip(weights, rates, grads, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                mean, square = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                weight -= rate * (1 - step / STEPS) * mean / (square.sqrt() + 1e-8)
    found = find_layers(trained).layers[number]
    for path in family.attention:
        expected, product = (
            (m.get_submodule(path).up.weight @ m.get_submodule(path).down.weight) for m in (layer, found)
        )
        torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.get_parameter(names[-1]), layer.get_parameter(names[-1]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_emulator_comes_nearer_to_the_base(family):
    model = base(family)
    batches = calibration(model)
    plain, trained = (emulator(model, batches, keep=0.5, distil=steps) for steps in (0, 30))
    away = [sum((logits(one, b) - logits(model, b)).square().sum() for b in batches) for one in (plain, trained)]
    assert away[1] < 0.9 * away[0]


def test_only_factors_and_the_columns_that_write_learn():
    model = base()
    batches = calibration(model)
    plain, trained = emulators(model, batches, [settings(keep=0.5, distil=steps) for steps in (0, STEPS)])
    changed = {
        name.split("layers.")[1].partition(".")[2]
        for name in plain.frozen
        if not torch.equal(plain.frozen[name], trained.frozen[name])
    }
    family = family_of(model.config)
    expected = {f"{path}.{side}.weight" for path in family.attention for side in ("down", "up")}
    assert changed == expected | {f"{family.writes}.weight"}
    assert plain.middle == trained.middle
    for name in (name for name in trained.frozen if name.endswith(".up.weight")):
        pair = trained.frozen[name], trained.frozen[name.replace(".up.", ".down.")]
        for factor, expected in zip(pair, canonical(*pair), strict=True):
            torch.testing.assert_close(factor, expected, rtol=1e-6, atol=1e-9)


def test_a_layer_that_gets_no_better_stays_as_it_was_bit_for_bit(monkeypatch):
    monkeypatch.setattr(distil, "RATE", 1e3)
    model = base()
    batches = calibration(model)
    plain, trained = emulators(model, batches, [settings(keep=0.5, distil=steps) for steps in (0, 2)])
    assert all(torch.equal(plain.frozen[name], trained.frozen[name]) for name in plain.frozen)


def test_small_steps_add_up_in_half_precision():
    """Each is far below what bfloat16 tells apart."""
    model = base().bfloat16()
    batches = calibration(model)
    plain, trained = emulators(model, batches, [settings(keep=0.5, distil=steps) for steps in (0, 40)])
    names = [name for name in plain.frozen if name.endswith("down_proj.weight")]
    assert all(trained.frozen[name].dtype == torch.bfloat16 for name in names)
    moved = [((trained.frozen[n] - plain.frozen[n]).norm() / plain.frozen[n].norm()).item() for n in names]
    assert min(moved) > 0.01


def test_the_model_is_left_as_it_was():
    model = base()
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modules = [*model.modules()]
    emulator(model, calibration(model), keep=0.5, distil=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert (parameter.requires_grad, parameter.grad) == before[name][1:]
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize(
    ("values", "words"), [({"distil": -1}, "distil is -1"), ({"method": "crash", "distil": 1}, "is crash")]
)
def test_what_it_is_not_for_is_refused(values, words):
    with pytest.raises(RecipeError, match=words):
        settings(**values).check()
