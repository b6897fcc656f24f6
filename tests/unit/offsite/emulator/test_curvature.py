"""Curvature that is kept between measuring and compression: the whole of the tokens, and only where it is smaller."""

import pytest
import torch
from support.emulators import base, calibration, settings

from siftune.offsite.emulator import make, plan
from siftune.offsite.emulator.curvature import halves, keep_whole, kept_whole
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import Base, Split
from siftune.offsite.emulator.record import States, record, replay

NUMBER = 2
CPU = torch.device("cpu")


def kept(model, folder, rows):
    """What the matrices of a layer saw, and where its curvature is kept."""
    whole = Base(model, Split(1, 1))
    captured = replay(whole, record(whole, calibration(model, count=5, rows=rows)), NUMBER, whole.family.matrices)
    states = States(folder, "curvature")
    keep_whole(states, NUMBER, halves(captured, slopes=False), len(next(iter(captured.values())).x_NI))
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
