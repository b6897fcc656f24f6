"""The stronger attacks of an audit as a whole: shadow models, recovery, and the data owner's own audit."""

import copy
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.audits import QUICK, SPLIT, TOKENIZER, losses, models, rows, same, shorter, snapshot, whole

from siftune.base.errors import DataError, KitError, RecipeError
from siftune.data.rows import rows_from
from siftune.offsite.audits import stages
from siftune.offsite.audits.audit import audit, own_audit
from siftune.offsite.audits.lira import halves
from siftune.offsite.audits.members import AuditRows, tokenize_audit
from siftune.offsite.audits.models import OffsiteModels, Tuning, read_outer, tuned
from siftune.offsite.audits.settings import AuditOptions, AuditSettings

LEARNT = replace(QUICK, steps=30, lr=1e-2, batch_size=8)


def letters(count, seed=1):
    generator = random.Random(seed)
    words = [["".join(generator.choices("abcdefgh", k=5)) for _ in range(2)] for _ in range(count)]
    return rows_from([{"prompt": prompt, "completion": completion} for prompt, completion in words])


def cut(members, others, settings):
    made = letters(members + others)
    return replace(tokenize_audit(made[:members], made[members:], TOKENIZER, settings), questions=None)


def outer_tuned(both, data, settings):
    """What a data owner would return."""
    outer = [0, both.emulator.config.num_hidden_layers - 1]
    with tuned(both.emulator, outer, Tuning(data.train, TOKENIZER, settings)):
        return read_outer(both.emulator, SPLIT)


def test_shadow_models_tell_members_that_were_memorised():
    settings = replace(LEARNT, shadows=4, membership=True)
    data = cut(8, 8, settings)
    both = models(whole)
    before = snapshot(both.base), snapshot(both.emulator)
    told = []
    found = audit(both, data, settings, progress=lambda *what: told.append(what)).membership
    assert same(both.base, before[0])
    assert same(both.emulator, before[1])
    assert found.online.auc.value > 0.95
    assert (found.shadows, found.online.members, found.online.others) == (4, 8, 8)
    assert [what for what in told if what[0] == "shadow models"][-1] == ("shadow models", 4, 4)


def test_every_shadow_model_is_tuned_on_its_half_as_often_as_the_return(monkeypatch):
    settings = replace(LEARNT, steps=4, lr=5e-3, shadows=2, membership=True)
    data = cut(12, 8, settings)
    seen = []
    original = stages.Tuning
    monkeypatch.setattr(stages, "Tuning", lambda *parts: seen.append(parts) or original(*parts))
    audit(models(), data, settings)
    pool = [*data.train["input_ids"], *data.held_out["input_ids"]]
    seen = [parts for parts in seen if parts[2].seed != settings.seed]  # the others are the audit's own tunings
    for chosen, (part, _, how) in zip(halves(2, 20, settings.seed), seen, strict=True):
        assert list(part["input_ids"]) == [pool[i] for i in np.flatnonzero(chosen)]
        assert how.steps == 3  # four steps for twelve rows are three for ten
    assert seen[0][2].seed != seen[1][2].seed != settings.seed


def test_shadow_models_tell_nothing_of_a_return_that_was_not_tuned():
    settings = replace(LEARNT, steps=4, lr=5e-3, shadows=4, membership=True, level=0.999, resamples=400)
    both = models(whole)
    found = audit(both, cut(24, 24, settings), settings, read_outer(both.base, SPLIT)).membership
    for one in (found.online, found.loss, found.blind):
        assert one.auc.low < 0.5 < one.auc.high


def test_blind_is_the_base_s_loss_and_tells_sources_apart():
    """Members are the rows that the base finds hard already, the others those that it finds easy."""
    both, settings = models(whole), replace(QUICK, membership=True)
    made = cut(40, 40, settings).train
    order = np.argsort(losses(both.base, made) / 6).tolist()  # completions of five letters and an end
    data = AuditRows(made.select(order[20:]), made.select(order[:20]))
    found = audit(both, data, settings, read_outer(both.base, SPLIT)).membership
    assert found.blind.auc.value == 0
    assert found.blind.tells_apart
    assert found.loss.auc == found.blind.auc  # though nothing was trained


def test_recovery_is_a_curve_for_every_rate_and_the_best_end_counts():
    settings = replace(QUICK, steps=8, recovery=True, recovery_lrs=(1e-5, 3e-3))
    both, data = models(), rows(False)
    found = audit(both, data, settings)
    length = np.mean([len(data.train[i]["input_ids"]) for i in range(20)])
    steps = [1, 2, 4, 8]
    assert [(p.lr, p.tokens) for p in found.recovery] == [
        (lr, round(s * 4 * length)) for lr in (1e-5, 3e-3) for s in steps
    ]
    ends = [p for p in found.recovery if p.tokens == found.recovery[-1].tokens]
    assert found.conditions["recovered"].nll.value == pytest.approx(min(p.nll.value for p in ends))
    assert found.comparisons["nll"].recovery.value == pytest.approx(max(p.recovery.value for p in ends))
    assert all(p.nll.low < p.nll.value < p.nll.high for p in found.recovery)
    single = audit(models(), data, replace(settings, recovery_lrs=(3e-3,)))
    assert single.recovery == found.recovery[4:]  # being measured on the way changes nothing


def test_three_rates_by_default():
    assert AuditSettings(lr=2e-4).rates == pytest.approx((2e-4, 6e-4, 2e-3))
    assert AuditSettings(recovery_lrs=(1.0,)).rates == (1.0,)


def test_a_point_on_the_way_is_measured_at_that_step():
    settings = replace(QUICK, steps=5, recovery=True, recovery_lrs=(3e-3,))  # 20 rows, each seen once
    both, data = models(), rows(False)
    found = audit(both, data, settings)
    tokens = sum(label != -100 for labels in data.held_out["labels"] for label in labels[1:])
    seen = []

    def look(done, _):
        if done in (1, 2, 5):
            seen.append(losses(copy.deepcopy(both.emulator).eval(), data.held_out).sum() / tokens)

    with tuned(both.emulator, range(4), Tuning(data.train, TOKENIZER, settings), 3e-3, look):
        pass
    assert [p.nll.value for p in found.recovery] == pytest.approx(seen, rel=1e-5)
    assert len(set(seen)) == 3


# --- without the base


def alone(both):
    return OffsiteModels(both.emulator, both.emulator, SPLIT, TOKENIZER)


def test_a_data_owner_whose_emulator_is_the_base_sees_what_the_owner_sees():
    settings = replace(LEARNT, membership=True)
    data, both = cut(16, 16, settings), models(whole)
    returned = outer_tuned(both, data, settings)
    before = snapshot(both.emulator)
    own = own_audit(alone(both), data, returned, settings)
    assert same(both.emulator, before)
    assert own == audit(both, data, settings, returned).membership
    assert own.loss.auc.value > 0.9


def test_shadow_models_of_a_data_owner_see_each_row_as_often_as_those_of_the_owner():
    """Also if the steps do not suffice for all rows, as where few are given for many rows."""
    settings = replace(QUICK, steps=2, batch_size=4, shadows=2, membership=True, membership_rows=16)
    data, both = cut(32, 16, settings), models(whole)
    returned = outer_tuned(both, data, replace(settings, steps=24))
    own, owners = own_audit(alone(both), data, returned, settings), audit(both, data, settings, returned).membership
    assert own == owners
    assert own.online.auc.low < own.online.auc.high


@pytest.mark.slow
def test_a_data_owner_sees_nearly_what_the_owner_sees():
    settings = replace(LEARNT, steps=60, membership=True)
    data, both = cut(16, 24, settings), models(shorter)
    returned = outer_tuned(both, data, settings)
    own, owners = own_audit(alone(both), data, returned, settings), audit(both, data, settings, returned).membership
    for name in ("loss", "reference"):
        here, there = getattr(own, name).auc, getattr(owners, name).auc
        assert abs(here.value - there.value) < 0.15
        assert max(here.low, there.low) <= min(here.high, there.high)
    assert own.reference.auc.value > 0.9


def test_a_return_that_was_not_tuned_tells_its_owner_nothing():
    settings = replace(QUICK, membership=True)
    both = models()
    own = own_audit(alone(both), cut(20, 20, settings), read_outer(both.emulator, SPLIT), settings)
    assert own.reference.auc.value == own.reference.auc.low == own.reference.auc.high == 0.5
    assert own.loss.auc == own.blind.auc


def test_what_a_data_owner_cannot_audit():
    both, settings = models(), QUICK
    data = cut(6, 4, settings)
    sent = read_outer(both.emulator, SPLIT)
    name = next(iter(sent))
    with pytest.raises(KitError, match=name):
        own_audit(alone(both), data, {key: tensor for key, tensor in sent.items() if key != name}, settings)
    with pytest.raises(DataError, match="every held-out row"):
        own_audit(alone(both), replace(data, held_out=data.train), sent, settings)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("steps", {"steps": 0}),
        ("max_length", {"max_length": 1}),
        ("lr", {"lr": 0.0}),
        ("level", {"level": 1.0}),
        ("seed", {"seed": -1}),
        ("shadows", {"shadows": 1}),
        ("shadows", {"shadows": 4, "membership": False}),
        ("recovery_lrs", {"recovery_lrs": (1e-3, 0.0)}),
        ("recovery_lrs", {"recovery_lrs": (float("inf"),)}),
        ("--model", {"model": ""}),
        ("--no-membership", {"model": "", "returned": Path("R"), "membership": False}),
        ("recovery_lrs", {"model": "", "returned": Path("R"), "recovery_lrs": (1e-3,)}),
    ],
)
def test_settings_out_of_range(name, changes):
    with pytest.raises(RecipeError, match=name):
        AuditOptions(**{"model": "m", "kit": "k", "train": "t", "eval": "e", **changes}).check()
