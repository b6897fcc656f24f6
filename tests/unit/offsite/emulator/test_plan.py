"""What matrices would cost at several sizes: against changes formed densely, on tokens that did not choose them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.curvature import curvature
from support.emulators import base, calibration, halved, seen_by, settings

from siftune.base.errors import RecipeError
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator import plan as plans
from siftune.offsite.emulator.compress import Compression
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import Base, Split, weight_OI
from siftune.offsite.emulator.plan import SHARES, layer_costs, measured_paths, plan, uniform_layers
from siftune.offsite.emulator.record import States, record
from siftune.offsite.maths.channels import channel_scores, keep_channels, refit, refit_scores
from siftune.offsite.maths.drd import components, factor, rank_of

NUMBER = 2
MEASURED = {"allot": "measured", "keep": 0.5}


def seen(family):
    whole = Base(base(family), Split(1, 1))
    recording = record(whole, calibration(whole.model, count=4, rows=4))
    return whole, seen_by(whole, recording, NUMBER, whole.family.matrices)


def half(captured, second):
    """Inputs and output gradients of half of the tokens."""
    middle = len(captured.x_NI) // 2
    part = slice(middle, None) if second else slice(0, middle)
    return captured.x_NI[part], captured.g_NO[part]


def lost(change, captured):
    """The mean square of what a change writes, weighed by G: both moments token by token, in float64."""
    x, g = (rows.double() for rows in half(captured, True))
    inputs = sum(torch.outer(row, row) for row in x) / len(x)
    gradients = sum(torch.outer(row, row) for row in g) / len(g)
    return torch.trace(change.double().T @ gradients @ change.double() @ inputs).item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("basis", ["whitened", "svd"])
def test_costs_of_factored_matrices(family, basis):
    whole, captured = seen(family)
    layer, matrices = whole.layers[NUMBER], whole.family
    how = Compression(basis=basis, lambda_attn=0.3, protect=0.1)
    tables = layer_costs(whole, NUMBER, halved(captured, slopes=True), how)
    for path, (sizes, lost_at) in zip(matrices.attention, tables[:-1], strict=True):
        weight = weight_OI(layer.get_submodule(path)).detach().float()
        known = curvature(*half(captured[path], False))
        for share, size, cost in [*zip(SHARES, sizes.tolist(), lost_at.tolist(), strict=True)][::6]:
            rank = rank_of(share, *weight.shape)
            up, down = factor(components(weight, known, basis), known, rank, 0.3, 0.1)
            assert size == (up.numel() + down.numel() if share < 1 else weight.numel())
            expected = lost(weight - up @ down, captured[path]) if share < 1 else 0.0
            assert cost == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("mlp", ["refit", "channels"])
def test_costs_of_channels(family, mlp):
    whole, captured = seen(family)
    layer, matrices = whole.layers[NUMBER], whole.family
    how = Compression(mlp=mlp)
    assert measured_paths(matrices) == (*matrices.attention, matrices.writes)
    sizes, lost_at = layer_costs(whole, NUMBER, halved(captured, slopes=True), how)[-1].tolist()
    known = {path: curvature(*half(captured[path], False)) for path in matrices.matrices}
    weights = {path: weight_OI(layer.get_submodule(path)).detach().float() for path in matrices.matrices}
    writes, inputs = weights[matrices.writes], known[matrices.writes].inputs
    if mlp == "refit":
        scores = refit_scores(writes, known[matrices.writes], 0.0)
    else:
        reads = [(weights[path], known[path]) for path in matrices.reads]
        scores = channel_scores(reads, (writes, known[matrices.writes]), 0.0)
    for share, size, cost in [*zip(SHARES, sizes, lost_at, strict=True)][:-1:4]:
        kept = keep_channels(scores, int(share * 48 + 1e-9))
        change = writes.clone()
        change[:, kept] -= refit(writes, inputs, kept) if mlp == "refit" else writes[:, kept]
        assert size == len(kept) * 32 * (len(matrices.reads) + 1)
        assert cost == pytest.approx(lost(change, captured[matrices.writes]), rel=1e-3, abs=1e-7)
    assert (sizes[-1], lost_at[-1]) == (48 * 32 * (len(matrices.reads) + 1), 0.0)


@pytest.mark.parametrize("mlp", ["refit", "channels"])
def test_what_is_shared_out_is_what_is_kept(mlp):
    model = base()
    batches = calibration(model)
    how = settings(**MEASURED, mlp=mlp)
    whole = Base(model, how.split)
    steps = plan(whole, record(whole, batches), how)
    (parts,) = emulators(model, batches, [how])
    family, kept, every = family_of(model.config), 0, 0
    for step, shape in zip(steps, parts.middle, strict=True):
        layer = find_layers(model).layers[step.number]
        for path in family.matrices:
            weight = weight_OI(layer.get_submodule(path))
            part = path if path in family.attention else family.writes
            share, every = step.shares[part], every + weight.numel()
            assert share in SHARES
            if share == 1:
                assert path not in shape.ranks
                kept += weight.numel()
            elif path in family.attention:
                assert shape.ranks[path] == rank_of(share, *weight.shape)
                kept += shape.ranks[path] * sum(weight.shape)
            else:
                assert shape.channels == int(share * 48 + 1e-9)
                kept += shape.channels * 32
    assert 0.45 * every < kept <= 0.5 * every
    assert len({share for step in steps for share in step.shares.values()}) > 2


def test_it_costs_less_than_equal_shares():
    """Summed over all matrices, on the tokens that are measured on: what the split is chosen for."""
    model = base()
    how = settings(**MEASURED)
    whole = Base(model, how.split)
    recording = record(whole, calibration(model, count=4, rows=4))
    family, sums = whole.family, {"measured": 0.0, "equal": 0.0}
    for step in plan(whole, recording, how):
        captured = seen_by(whole, recording, step.number, family.matrices)
        tables = layer_costs(whole, step.number, halved(captured, slopes=False), how)
        for path, (_, lost_at) in zip(measured_paths(family), tables, strict=True):
            sums["measured"] += lost_at[SHARES.index(step.shares[path])].item()
            sums["equal"] += lost_at[SHARES.index(0.5)].item()
    assert sums["measured"] < 0.8 * sums["equal"]


def test_several_at_once_go_their_own_ways_and_measure_once_what_is_the_same(monkeypatch):
    model = base()
    batches = calibration(model)
    choices = [
        settings(**MEASURED), settings(keep=0.5), settings(**MEASURED, mlp="channels"),
        settings(keep=0.8, allot="measured"), settings(**MEASURED, damping=0.1),
    ]  # fmt: skip
    original, measured = plans.layer_costs, []
    monkeypatch.setattr(plans, "layer_costs", lambda *args: measured.append(1) or original(*args))
    emulators(model, batches, choices)
    assert len(measured) == 3 * 3
    for choice, parts in zip(choices, emulators(model, batches, choices), strict=True):
        (alone,) = emulators(model, batches, [choice])
        assert all(torch.equal(alone.frozen[name], parts.frozen[name]) for name in alone.frozen)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_one_part_is_shared_out_by_itself(part):
    model = base()
    how = settings(**MEASURED, parts=part)
    whole = Base(model, how.split)
    recording = record(whole, calibration(model, count=4, rows=4))
    both = plan(whole, recording, settings(**MEASURED))
    steps, paths = plan(whole, recording, how), measured_paths(whole.family, part)
    (parts,) = emulators(model, calibration(model, count=4, rows=4), [how])
    kept, every = 0, 0
    for step, of_both, shape in zip(steps, both, parts.middle, strict=True):
        assert set(step.shares) == set(paths) < set(of_both.shares)
        assert shape.channels is None if part == "attention" else not shape.ranks
        for path in paths:
            weight = weight_OI(whole.layers[step.number].get_submodule(path))
            every += weight.numel()
            rest = weight.numel() if shape.channels is None else shape.channels * 32
            kept += shape.ranks[path] * sum(weight.shape) if path in shape.ranks else rest
    assert 0.4 * every < kept <= 0.5 * every


def test_measuring_leaves_gradients_of_the_last_layer_alone(monkeypatch):
    """In memory: compression computes those of the others again."""
    model, how = base(layers=8), settings(**MEASURED)
    whole = Base(model, how.split)
    recording = record(whole, calibration(model))
    most, original = [], States.put

    def put(self, number, batches):
        original(self, number, batches)
        most.append(sum(recording.grads.has(n) for n in recording.numbers))

    monkeypatch.setattr(States, "put", put)
    plan(whole, recording, how)
    assert [n for n in recording.numbers if recording.grads.has(n)] == [6]
    assert max(most) == 3  # of the last, this one and the one below


def test_shares_below_the_least_are_refused():
    with pytest.raises(RecipeError, match=r"keep is 0\.05.* allot uniform"):
        settings(allot="measured", keep=0.05).check()
    settings(method="layerdrop", allot="measured", keep=0.05).check()


@given(count=st.integers(1, 99), data=st.data())
def test_uniform_layers(count, data):
    kept = data.draw(st.integers(0, count))
    got = uniform_layers(count, kept)
    assert len(got) == kept
    assert got == sorted(set(got))
    assert set(got) <= set(range(count))
    if kept >= 2:
        assert (got[0], got[-1]) == (0, count - 1)
        gaps = [after - before for before, after in itertools.pairwise(got)]
        assert max(gaps) - min(gaps) <= 1
    if kept == count:
        assert got == list(range(count))


@pytest.mark.parametrize(
    ("count", "kept", "layers"),
    [(20, 8, [0, 3, 5, 8, 11, 14, 16, 19]), (26, 2, [0, 25]), (26, 1, [13]), (1, 1, [0]), (26, 0, [])],
)
def test_uniform_layers_of_offsite_tuning(count, kept, layers):
    assert uniform_layers(count, kept) == layers


@pytest.mark.parametrize("kept", [-1, 7])
def test_counts_out_of_range(kept):
    with pytest.raises(RecipeError, match=rf"{kept} of 6"):
        uniform_layers(6, kept)
