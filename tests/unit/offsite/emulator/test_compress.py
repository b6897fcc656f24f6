"""One layer's compression: the formulas get the right matrices, and each λ acts where it says."""

import pytest
import torch
from support.curvature import curvature
from support.emulators import FAMILIES, base, calibration, seen_by, summed

from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator.compress import Compression, compress_layer
from siftune.offsite.emulator.model import Base, Split, weight_OI
from siftune.offsite.emulator.record import record
from siftune.offsite.maths.channels import channel_scores, keep_channels, refit, refit_scores
from siftune.offsite.maths.drd import component_scores, components, keep_components, rank_of

NUMBER = 2


def seen(model, batches=None, slopes=True):
    family = family_of(model.config)
    whole = Base(model, Split(1, 1))
    recording = record(whole, batches or calibration(model, count=4, rows=4))
    layer = find_layers(model).layers[NUMBER]
    captured = seen_by(whole, recording, NUMBER, family.matrices)
    return layer, family, captured, summed(captured, slopes)


def compress(model, **values):
    layer, family, captured, curvatures = seen(model)
    return layer, family, captured, compress_layer(Base(model, Split(1, 1)), NUMBER, curvatures, Compression(**values))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_factored_matrix_is_the_sum_of_the_components_with_the_highest_scores(family):
    how = {"keep": 0.5, "basis": "svd", "protect": 0.0, "lambda_attn": 0.3, "lambda_mlp": 0.7}
    layer, matrices, captured, found = compress(base(family), **how)
    assert set(found.shape.ranks) == set(matrices.attention)
    for path in matrices.attention:
        weight = weight_OI(layer.get_submodule(path)).float()
        known = curvature(captured[path].x_NI, captured[path].g_NO)
        parts = components(weight, known, "svd")
        rank = rank_of(0.5, *weight.shape)
        kept = keep_components(component_scores(parts, known, 0.3), parts.size_K, rank, 0.0)
        expected = sum(torch.outer(parts.left_OK[:, k], parts.right_KI[k]) for k in kept)
        product = found.tensors[f"{path}.up.weight"] @ found.tensors[f"{path}.down.weight"]
        torch.testing.assert_close(product.float(), expected, rtol=1e-4, atol=1e-5)
        assert found.shape.ranks[path] == rank == found.tensors[f"{path}.down.weight"].shape[0]
        bias = layer.get_submodule(path).bias
        assert bias is None or torch.equal(found.tensors[f"{path}.up.bias"], bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_has_the_channels_with_the_highest_scores(family):
    layer, matrices, captured, found = compress(base(family), keep=0.5, lambda_mlp=0.3, mlp="channels")
    known = {path: curvature(captured[path].x_NI, captured[path].g_NO) for path in matrices.matrices}
    weights = {path: weight_OI(layer.get_submodule(path)).detach() for path in (*matrices.reads, matrices.writes)}
    reads = [(weights[path].float(), known[path]) for path in matrices.reads]
    scores = channel_scores(reads, (weights[matrices.writes].float(), known[matrices.writes]), 0.3)
    kept = keep_channels(scores, found.shape.channels)
    assert found.shape.channels == int(0.5 * weights[matrices.writes].shape[1])
    assert torch.equal(found.tensors[f"{matrices.writes}.weight"], weights[matrices.writes][:, kept])
    for path in matrices.reads:
        assert torch.equal(found.tensors[f"{path}.weight"], weights[path][kept])
        bias = layer.get_submodule(path).bias
        assert bias is None or torch.equal(found.tensors[f"{path}.bias"], bias[kept])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_mlp_has_the_channels_whose_loss_the_others_make_up_for_least(family):
    layer, matrices, captured, found = compress(base(family), keep=0.5, lambda_mlp=0.3, mlp="refit")
    known = {path: curvature(captured[path].x_NI, captured[path].g_NO) for path in matrices.matrices}
    weights = {path: weight_OI(layer.get_submodule(path)).detach() for path in (*matrices.reads, matrices.writes)}
    writes, inputs = weights[matrices.writes], known[matrices.writes].inputs
    kept = keep_channels(refit_scores(writes, known[matrices.writes], 0.3), writes.shape[1] // 2)
    assert found.shape.channels == len(kept)
    fitted = refit(writes, inputs, kept).to(writes.dtype)
    assert torch.equal(found.tensors[f"{matrices.writes}.weight"], fitted)
    assert not torch.equal(fitted, writes[:, kept])
    for path in matrices.reads:
        assert torch.equal(found.tensors[f"{path}.weight"], weights[path][kept])
        bias = layer.get_submodule(path).bias
        assert bias is None or torch.equal(found.tensors[f"{path}.bias"], bias[kept])


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_one_part_alone_is_compressed_as_in_both_and_the_other_stays(part):
    model = base()
    layer, matrices, captured, both = compress(model, keep=0.5)
    how = Compression(keep=0.5, parts=part)
    known = summed({path: captured[path] for path in how.judged(matrices)}, slopes=False)
    alone = compress_layer(Base(model, Split(1, 1)), NUMBER, known, how)
    own = "self_attn." if part == "attention" else "mlp."
    compressed = {name for name in both.tensors if name.startswith(own)}
    assert set(alone.tensors) == compressed | {name for name in layer.state_dict() if not name.startswith(own)}
    for name, tensor in alone.tensors.items():
        assert torch.equal(tensor, both.tensors[name] if name in compressed else layer.state_dict()[name])
    assert (bool(alone.shape.ranks), alone.shape.channels is None) == (part == "attention", part == "attention")


@pytest.mark.parametrize(("lam", "where"), [("lambda_attn", "self_attn.q_proj.up"), ("lambda_mlp", "mlp.down_proj")])
@pytest.mark.parametrize("mlp", ["channels", "refit"])
def test_the_unit_of_lambda_arrives(mlp, lam, where):
    model = base()
    found = [
        compress(model, keep=0.5, mlp=mlp, lambda_unit=unit, **{lam: 0.3})[3].tensors[f"{where}.weight"]
        for unit in ("relative", "paper")
    ]
    assert not torch.equal(*found)


@pytest.mark.parametrize("mlp", ["channels", "refit"])
def test_each_lambda_acts_on_its_own_part(mlp):
    model = base()
    plain, attn, mlp = (
        compress(model, keep=0.5, mlp=mlp, **values)[3].tensors
        for values in ({}, {"lambda_attn": 3.0}, {"lambda_mlp": 3.0})
    )
    for name in plain:
        same_attn, same_mlp = torch.equal(plain[name], attn[name]), torch.equal(plain[name], mlp[name])
        if name.startswith("self_attn"):
            assert same_mlp
            assert not same_attn
        elif name.startswith("mlp"):
            assert same_attn
            assert not same_mlp


def test_without_slopes_nothing_else_changes():
    model = base()
    _, _, captured, with_slopes = seen(model)
    without = summed(captured, slopes=False)
    results = [
        compress_layer(Base(model, Split(1, 1)), NUMBER, known, Compression(keep=0.5))
        for known in (with_slopes, without)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(r.tensors.values() for r in results), strict=True))


def test_the_number_of_channels_does_not_suffer_from_binary_fractions():
    model = base(intermediate_size=100)
    assert compress(model, keep=0.29)[3].shape.channels == 29


def test_the_layer_is_left_as_it_was():
    model = base()
    before = {name: t.clone() for name, t in find_layers(model).layers[NUMBER].state_dict().items()}
    compress(model, keep=0.5)
    for name, tensor in find_layers(model).layers[NUMBER].state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("name", "values"), [("damping", (1e-3, 10.0)), ("protect", (0.0, 1.0))])
def test_settings_of_attention_arrive(name, values):
    model = base()
    found = [compress(model, keep=0.5, lambda_attn=5.0, **{name: value})[3].tensors for value in values]
    key = "self_attn.q_proj.up.weight"
    assert not torch.allclose(found[0][key], found[1][key])
