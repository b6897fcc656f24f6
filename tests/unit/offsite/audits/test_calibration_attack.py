"""Who calibrated a kit: scores matrix by matrix against plain products, and what the attack finds on tiny models."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.emulators import FAMILIES, base, calibration, emulator

from siftune.evaluate.bootstrap import Bootstrap
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.audits.calibration_attack import attack_calibration, compared, residuals, row_residuals
from siftune.offsite.emulator.model import Split, weight_OI

SPLIT = Split(1, 1)
FEW = Bootstrap(200)


def rows(model, seed, count):
    """One batch of rows of full length each, which no two seeds share."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (count, 12), generator=generator)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_those_of_the_matrices_on_the_base_s_own_inputs(family):
    model = base(family)
    batches = calibration(model)
    small = emulator(model, batches, keep=0.5)
    matrices = compared(model, small, SPLIT)
    found = row_residuals(model, matrices, batches)
    table = family_of(model.config)
    assert [one.name for one in matrices] == [f"{n}.{p}" for n in (1, 2, 3) for p in (*table.attention, table.writes)]
    assert {one.kind for one in matrices if one.name.endswith(table.writes)} == {"mlp"}
    number, path = 2, table.writes
    for chosen in (path, table.attention[0]):
        module, other = (find_layers(m).layers[number].get_submodule(chosen) for m in (model, small))
        seen = []
        handle = module.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        wanted = []
        for batch in batches:
            with torch.no_grad():
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            x, y = seen.pop()
            shape = (*batch["input_ids"].shape, -1)
            x, y = x.reshape(shape), y.reshape(shape)
            if chosen == path:  # channels whose rows the kit still has
                reads = [weight_OI(find_layers(m).layers[number].get_submodule(table.reads[0])) for m in (model, small)]
                x = x[..., [[torch.equal(a, b) for a in reads[0]].index(True) for b in reads[1]]]
            lost = (y - other(x)).detach().square().sum(-1)
            for row, mask in enumerate(batch["attention_mask"].bool()):
                share = lost[row][mask].sum() / y[row][mask].square().sum()
                wanted.append(share.log().item())
        handle.remove()
        np.testing.assert_allclose(found[f"{number}.{chosen}"], wanted, rtol=1e-6)


def test_the_model_is_as_it_was():
    model = base().train()
    batches = calibration(model)
    small = emulator(model, batches, keep=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    row_residuals(model, compared(model, small, SPLIT), batches)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_calibration_rows_are_told_where_a_few_were_fitted_to():
    model = base(layers=6)
    own, others = rows(model, 1, 4), rows(model, 2, 40)
    small = emulator(model, own, keep=0.5)
    found = attack_calibration(model, small, SPLIT, own, others, FEW)
    assert found.attacks["mlp"].auc.value > 0.95
    assert found.attacks["all"].auc.low > 0.9
    assert found.strongest.auc.value >= found.attacks["attention"].auc.value
    assert (found.attacks["all"].members, found.attacks["all"].others) == (4, 40)
    assert {one.name for one in compared(model, small, SPLIT)} == {f"{n}.{p}" for n in (1, 2, 3, 4) for p in (
        *(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.down_proj"
    )}  # fmt: skip


def test_rows_that_did_not_calibrate_the_kit_are_at_chance():
    model = base(layers=6)
    small = emulator(model, rows(model, 1, 8), keep=0.5)
    found = attack_calibration(model, small, SPLIT, rows(model, 4, 80), rows(model, 5, 80), Bootstrap(400, level=0.999))
    for one in found.attacks.values():
        assert one.auc.low < 0.5 < one.auc.high


def test_directions_of_the_weight_alone_tell_nothing_without_channels():
    """`svd` directions, all of them protected: no calibration row has a part in the attention matrices."""
    model = base(layers=4)
    own, others = rows(model, 1, 6), rows(model, 2, 60)
    small = emulator(model, own, keep=0.5, basis="svd", protect=1.0)
    found = attack_calibration(model, small, SPLIT, own, others, FEW)
    assert found.attacks["attention"].auc.low < 0.5 < found.attacks["attention"].auc.high


def test_whole_layers_leave_nothing_to_look_at():
    model = base()
    small = emulator(model, calibration(model), method="layerdrop", keep=0.4)
    found = attack_calibration(model, small, SPLIT, *(rows(model, seed, 5) for seed in (1, 2)), FEW)
    assert (found.attacks, found.strongest) == ({}, None)


def test_padding_and_batches_do_not_matter():
    model = base()
    batches = calibration(model, count=1)
    matrices = compared(model, emulator(model, batches, keep=0.5), SPLIT)
    whole = row_residuals(model, matrices, batches)
    single = []
    for row, mask in enumerate(batches[0]["attention_mask"].bool()):
        single.append({name: batches[0][name][row][mask][None] for name in ("input_ids", "attention_mask")})
    for name, found in row_residuals(model, matrices, single).items():
        np.testing.assert_allclose(found, whole[name], rtol=1e-6)


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_shares_token_by_token(seed, rows, length, outputs):
    generator = torch.Generator().manual_seed(seed)
    whole, kept = (torch.randn(rows, length, outputs, generator=generator, dtype=torch.float64) for _ in range(2))
    real = torch.rand(rows, length, generator=generator) > 0.4
    real[:, 0] = True
    for row, found in enumerate(residuals(whole, kept, real).tolist()):
        lost = size = 0.0
        for t in range(length):
            if real[row, t]:
                lost += sum((a - b) ** 2 for a, b in zip(whole[row, t].tolist(), kept[row, t].tolist(), strict=True))
                size += sum(a**2 for a in whole[row, t].tolist())
        assert found == pytest.approx(math.log(lost / size))


def test_nothing_lost_and_nothing_written():
    whole = torch.stack([torch.ones(3, 2), torch.zeros(3, 2)])
    assert residuals(whole, whole, torch.ones(2, 3).bool()).tolist() == pytest.approx([math.log(1e-12)] * 2)
