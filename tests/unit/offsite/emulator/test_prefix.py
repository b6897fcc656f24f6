"""Layers that are fitted on what the compressed ones below give: against the finished emulator, run as a whole."""

import copy

import pytest
import torch
from support.emulators import FAMILIES, base, calibration, emulator, settings

from siftune.errors import RecipeError
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import weight_OI
from siftune.offsite.maths.drd import components, factor, rank_of
from siftune.offsite.maths.kfac import Curvature, curvature, moments
from siftune.offsite.maths.refit import correct, refit, refit_scores
from siftune.offsite.maths.scp import keep_channels

SEQUENTIAL = {"keep": 0.5, "sequential": True}


def read_by(model, batches, module):
    """What a module reads at real tokens."""
    rows = []
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for inputs in batches:
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    handle.remove()
    real = [inputs["attention_mask"].bool().flatten() for inputs in batches]
    return torch.cat([x[r] for x, r in zip(rows, real, strict=True)]).float()


def gradients(model, batches, module):
    """Gradients of the summed loss for a module's output at real tokens."""
    rows = []
    handle = module.register_forward_hook(
        lambda _, __, out: out.register_hook(lambda grad: rows.append(grad.reshape(-1, grad.shape[-1]))) and None
    )
    for inputs in batches:
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["labels"][:, 1:].flatten()
        torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), labels, reduction="sum").backward()
    handle.remove()
    real = [inputs["attention_mask"].bool().flatten() for inputs in batches]
    return torch.cat([x[r] for x, r in zip(rows, real, strict=True)]).float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 3])
def test_what_writes_is_fitted_on_what_the_emulator_below_gives(family, number):
    model, matrices = base(family), family_of(base(family).config)
    batches = calibration(model, count=4, rows=4)
    small = emulator(model, batches, **SEQUENTIAL)
    whole, thin = (find_layers(one).layers[number] for one in (model, small))
    half = copy.deepcopy(small)
    trial = find_layers(half).layers[number]
    for path in (*matrices.reads, matrices.writes):
        trial.set_submodule(path, copy.deepcopy(whole.get_submodule(path)))
    for path in (matrices.attention[-1], matrices.writes):
        x = read_by(model, batches, whole.get_submodule(path))
        seen = read_by(half, batches, trial.get_submodule(path))
        beside_attention = family == "gpt_neox" and number == 1 and path == matrices.writes
        assert torch.allclose(x, seen) == beside_attention
        weight = weight_OI(whole.get_submodule(path)).detach()
        plain = curvature(x, gradients(model, batches, whole.get_submodule(path)))
        known = Curvature(moments(seen), plain.gradients, plain.slope_OI)
        fitted = correct(weight, x, seen)
        if path == matrices.writes:
            kept = keep_channels(refit_scores(fitted, known, 0.0), thin.get_submodule(path).weight.shape[1])
            found, expected = thin.get_submodule(path).weight, refit(fitted, known.inputs, kept)
        else:
            parts = components(fitted, known, "whitened")
            up, down = factor(parts, known, rank_of(0.5, *weight.shape), 0.0)
            found, expected = thin.get_submodule(path).up.weight @ thin.get_submodule(path).down.weight, up @ down
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-4)


def test_what_reads_is_chosen_as_without():
    model = base()
    batches = calibration(model)
    plain, fitted = (emulators(model, batches, [settings(keep=0.5, sequential=s)])[0] for s in (False, True))
    same = {name for name in plain.frozen if torch.equal(plain.frozen[name], fitted.frozen[name])}
    changed = {name.split("layers.")[1] for name in plain.frozen if name not in same}
    writes = {"self_attn.o_proj.down.weight", "self_attn.o_proj.up.weight", "mlp.down_proj.weight"}
    assert {name.partition(".")[2] for name in changed} - {"mlp.gate_proj.weight", "mlp.up_proj.weight"} == writes


def test_several_at_once_go_their_own_ways():
    model = base()
    batches = calibration(model)
    choices = [settings(**SEQUENTIAL), settings(keep=0.5), settings(keep=0.8, sequential=True)]
    for choice, parts in zip(choices, emulators(model, batches, choices), strict=True):
        (alone,) = emulators(model, batches, [choice])
        assert all(torch.equal(alone.frozen[name], parts.frozen[name]) for name in alone.frozen)


def test_the_model_is_left_as_it_was():
    model = base()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modules = [*model.modules()]
    emulator(model, calibration(model), **SEQUENTIAL)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def test_methods_that_fit_nothing_are_refused():
    with pytest.raises(RecipeError, match=r"svd\+flap fits no matrices"):
        settings(method="svd+flap", sequential=True).check()
