"""Curvature that is kept between measuring and compression: the whole of the tokens, and only where it is smaller."""

import pytest
import torch
from support.emulators import base, calibration, halved, seen_by, settings

from siftune.offsite.emulator import curvature, make, plan
from siftune.offsite.emulator.curvature import Sums, SumsOfHalves, keep_whole, kept_whole
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import Base, Split
from siftune.offsite.emulator.record import States, record, replay

NUMBER = 2
CPU = torch.device("cpu")


def kept(model, folder, rows):
    """What the matrices of a layer saw, and where its curvature is kept."""
    whole = Base(model, Split(1, 1))
    captured = seen_by(whole, record(whole, calibration(model, count=5, rows=rows)), NUMBER, whole.family.matrices)
    states = States(folder, "curvature")
    keep_whole(states, NUMBER, halved(captured, slopes=False), len(next(iter(captured.values())).x_NI))
    return captured, states


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_kept_whole_is_that_of_all_tokens(tmp_path, family, on_disk):
    captured, states = kept(base(family), tmp_path if on_disk else None, rows=8)
    count = len(next(iter(captured.values())).x_NI)
    assert count % 2 == 1  # halves of unequal weight
    found = kept_whole(states, NUMBER, list(captured), CPU).curvature
    assert set(found) == set(captured)
    for path, seen in captured.items():
        for rows, got in ((seen.x_NI, found[path].inputs), (seen.g_NO, found[path].gradients)):
            want = rows.double().T @ rows.double() / count
            torch.testing.assert_close(got.dense().double(), want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))
        assert not found[path].slope_OI.any()
        assert found[path].slope_OI.shape == (seen.g_NO.shape[1], seen.x_NI.shape[1])


@pytest.mark.parametrize("at_once", [1, 30, 10**6])
@pytest.mark.parametrize("rows", [1, 8])
def test_sums_over_batches_are_those_of_all_tokens(monkeypatch, at_once, rows):
    """Against the products of all tokens in float64; with one row, tokens are fewer than features."""
    whole = Base(base(), Split(1, 1))
    recording = record(whole, calibration(whole.model, count=5, rows=rows))
    paths = whole.family.matrices
    captured = seen_by(whole, recording, NUMBER, paths)
    count, middle = recording.positions, recording.positions // 2
    monkeypatch.setattr(curvature, "_AT_ONCE", at_once)
    sums, parts = Sums(count), SumsOfHalves(count, slopes=True)
    replay(whole, recording, NUMBER, paths, sums.add)
    replay(whole, recording, NUMBER, paths, parts.add)
    both = parts.halves()
    for found, part, scale in (  # D of the first half stands for all tokens
        (sums.curvature(), slice(None), 1),
        (both.chosen, slice(middle), count / middle),
        (both.other, slice(middle, None), 0),
    ):  # fmt: skip
        for path, seen in captured.items():
            x, g = seen.x_NI[part].double(), seen.g_NO[part].double()
            got = found.curvature[path]
            for moment, of in ((got.inputs, x), (got.gradients, g)):
                want = of.T @ of / len(of)
                assert moment.formed == (len(of) >= of.shape[1])
                torch.testing.assert_close(moment.dense().double(), want, rtol=1e-4, atol=1e-6 * float(want.max()))
            slope = scale * g.T @ x
            torch.testing.assert_close(got.slope_OI.double(), slope, rtol=1e-4, atol=1e-5 * float(g.abs().max()))


def test_matrices_that_read_the_same_share_what_is_kept():
    captured, states = kept(base(), None, rows=7)
    names = [name for name in states.get_named(NUMBER) if name.startswith("inputs")]
    assert len(names) == len({id(seen.x_NI) for seen in captured.values()}) < len(captured)


def test_rows_that_are_fewer_than_features_are_not_kept():
    _, states = kept(base(), None, rows=1)
    assert not states.has(NUMBER)
    assert kept_whole(states, NUMBER, ["self_attn.q_proj"], CPU) is None


def test_a_matrix_that_was_not_asked_for_is_not_there():
    _, states = kept(base(), None, rows=7)
    assert kept_whole(states, NUMBER, ["self_attn.q_proj", "other"], CPU) is None


@pytest.mark.parametrize(("changes", "runs"), [({}, 1), ({"lambda_mlp": 0.3}, 2), ({"allot": "uniform"}, 1)])
def test_a_layer_runs_again_only_where_slopes_are_asked_for(monkeypatch, changes, runs):
    model, how, seen = base(layers=5), settings(**{"keep": 0.5, "allot": "measured", **changes}), []
    for module in (make, plan):
        monkeypatch.setattr(module, "replay", lambda *args: seen.append(args[2]) or replay(*args))
    emulators(model, calibration(model, count=5, rows=7), [how])
    assert sorted(seen) == sorted([1, 2, 3] * runs)


def test_the_emulator_is_that_of_layers_that_run_again(monkeypatch):
    model, how = base(layers=5), settings(keep=0.5, allot="measured")
    batches = calibration(model, count=5, rows=7)
    [quick] = emulators(model, batches, [how])
    monkeypatch.setattr(make, "kept_whole", lambda *_: None)
    [slow] = emulators(model, batches, [how])
    assert quick.middle == slow.middle
    assert quick.frozen.keys() == slow.frozen.keys()
    for name, tensor in quick.frozen.items():
        torch.testing.assert_close(tensor, slow.frozen[name], rtol=1e-3, atol=1e-4)


def test_slopes_that_one_of_several_needs_are_computed():
    model, batches = base(layers=5), calibration(base(), count=5, rows=7)
    measured, with_slopes = settings(keep=0.5, allot="measured"), settings(keep=0.5, lambda_mlp=3.0)
    [alone] = emulators(model, batches, [with_slopes])
    [_, beside] = emulators(model, batches, [measured, with_slopes])
    assert all(torch.equal(tensor, beside.frozen[name]) for name, tensor in alone.frozen.items())


def test_nothing_is_kept_beside_a_lambda(monkeypatch):
    """Compression would not read it, since slopes are not kept."""
    monkeypatch.setattr(plan, "keep_whole", None)
    measured = settings(keep=0.5, allot="measured")
    emulators(base(layers=5), calibration(base(), count=5, rows=7), [measured, settings(keep=0.5, lambda_mlp=3.0)])
