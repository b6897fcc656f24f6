import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.audits import (
    QUICK,
    SETTINGS,
    SPLIT,
    TOKENIZER,
    losses,
    models,
    records,
    rows,
    same,
    snapshot,
    whole,
)

from siftune.base.errors import DataError
from siftune.data.batches import Collator
from siftune.data.rows import rows_from
from siftune.offsite.audits.audit import audit
from siftune.offsite.audits.gradients import gradient_cosine
from siftune.offsite.audits.members import drawn, not_among, tokenize_audit
from siftune.offsite.audits.membership import measure_attack
from siftune.offsite.audits.models import read_outer
from siftune.offsite.audits.result import LABELS
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.train.build import build
from siftune.train.trainer import SiftTrainer


@pytest.fixture(scope="module")
def audited():
    """An audit, the models after it, and what they were before."""
    both = models()
    before = [snapshot(model) for model in (both.base, both.emulator)]
    told = []
    found = audit(both, rows(), SETTINGS, progress=lambda *what: told.append(what))
    return found, both, before, told


# --- the slow obvious way


def tune(model, layers, lr, folder):
    """A fresh copy, tuned as `siftune train` would."""
    model = copy.deepcopy(model)
    recipe = Recipe(
        method="dense", adapter="full", layers=layers, steps=6, lr=lr, batch_size=4, seed=0, out=str(folder),
    )  # fmt: skip
    data = {"train": rows().train}
    built = build(resolve_recipe(recipe), model, TOKENIZER, data, folder)
    built.trainer.train()
    built.release()
    return model.eval()


def moved(source, target):
    """A copy of the target with the first and last layer of the source."""
    target = copy.deepcopy(target)
    for number in (0, -1):
        target.model.layers[number].load_state_dict(source.model.layers[number].state_dict())
    return target


def hits(model):
    """Right choices, each from a pass of its own."""
    found = []
    for row in records(100, 108):
        prompt = TOKENIZER(row["prompt"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = [*prompt, *TOKENIZER(choice)["input_ids"], TOKENIZER.eos_token_id]
            labels = [[-100] * len(prompt) + ids[len(prompt) :]]
            scores.append(-losses(model, {"input_ids": [ids], "labels": labels})[0])
        found.append(float(np.argmax(scores) == 0))
    return np.array(found)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The emulator with its outer layers tuned."""
    return tune(models().emulator, (0, -1), 3e-3, tmp_path_factory.mktemp("small"))


def test_all_conditions_are_what_they_say(audited, small, tmp_path):
    found, _, _, _ = audited
    both = models()
    full = tune(both.base, (0, -1), 3e-3, tmp_path)
    wanted = {
        "full_zs": both.base,
        "full_ft": full,
        "emulator_zs": both.emulator,
        "emulator_ft": small,
        "plug_in": moved(small, both.base),
        "recovered": tune(both.emulator, (0, 1, 2, 3), 1e-3, tmp_path),
    }
    data = rows().held_out
    assert found.accuracy == "choices"
    assert set(found.conditions) == set(wanted) == set(LABELS)
    for name, model in wanted.items():
        one = found.conditions[name]
        nll = losses(model, data)
        np.testing.assert_allclose(one.scores.nll, nll, rtol=2e-5, err_msg=name)
        assert one.nll.value == pytest.approx(nll.sum() / one.scores.tokens.sum(), rel=2e-5)
        assert one.nll.low < one.nll.value < one.nll.high
        assert one.scores.correct.tolist() == hits(model).tolist(), name
        assert one.accuracy.low <= one.accuracy.value == one.scores.correct.mean() <= one.accuracy.high
    assert found.conditions["full_zs"].scores.tokens.tolist() == [len(str(2 * i)) + 1 for i in range(100, 108)]


def test_the_figures_follow_from_the_conditions(audited):
    found = audited[0]
    for measure, field, sign in (("nll", "nll", -1), ("accuracy", "accuracy", 1)):
        mean = {name: sign * getattr(one, field).value for name, one in found.conditions.items()}
        one = found.comparisons[measure]
        assert one.delta.value == pytest.approx(mean["plug_in"] - mean["emulator_ft"])
        assert one.delta.low <= one.delta.value <= one.delta.high
        shares = {
            "gain_share": ("plug_in", "full_zs", "full_ft"),
            "recovery": ("recovered", "emulator_zs", "full_ft"),
        }
        for name, (a, b, c) in shares.items():
            gap, estimate = mean[c] - mean[b], getattr(one, name)
            if gap > 0:
                assert estimate.value == pytest.approx((mean[a] - mean[b]) / gap)
            else:
                assert estimate.value is None
    learned = found.comparisons["nll"]
    assert learned.gain_share.low < learned.gain_share.value < learned.gain_share.high
    assert learned.recovery.low < learned.recovery.value < learned.recovery.high


def test_membership_is_that_of_the_plugged_model(audited, small):
    found = audited[0].membership
    both, data = models(), rows()
    plugged_in = moved(small, both.base)
    sides = []
    for part in (data.train, data.held_out):
        tokens = np.array([sum(label != -100 for label in labels[1:]) for labels in part["labels"]])
        sides.append([losses(model, part) / tokens for model in (both.base, plugged_in)])
    (base_in, tuned_in), (base_out, tuned_out) = sides
    assert found.loss.auc.value == pytest.approx(measure_attack(-tuned_in, -tuned_out).auc.value)
    assert found.reference.auc.value == pytest.approx(
        measure_attack(base_in - tuned_in, base_out - tuned_out).auc.value
    )
    assert (found.members, found.others, found.left_out) == (20, 8, 0)
    assert found.loss.auc.low <= found.loss.auc.value <= found.loss.auc.high


def test_gradients_and_sizes(audited):
    found, both, _, _ = audited
    inputs = [Collator(0)(list(rows().held_out))]
    wanted = gradient_cosine(both.base, both.emulator, inputs, SPLIT)
    assert found.cosine.per_layer == pytest.approx(wanted.per_layer, abs=1e-5)
    assert found.cosine.overall == pytest.approx(wanted.overall, abs=1e-5)
    assert found.shares.middle == pytest.approx(2 / 3)
    counts = [sum(p.numel() for p in model.parameters()) for model in (both.emulator, both.base)]
    assert found.shares.whole == counts[0] / counts[1]


def test_models_are_as_they_were(audited):
    _, both, before, _ = audited
    assert same(both.base, before[0])
    assert same(both.emulator, before[1])


def test_progress_is_told(audited):
    told = audited[3]
    tunings = [label for label, done, total in told if (done, total) == (6, 6)]
    assert tunings == [f"{label}: tuning" for label in ("Full FT", "Emulator FT", "Recovered")]
    assert [label for label, done, _ in told if not done and label.endswith("measuring")] == [
        f"{label}: measuring" for label in ("Full ZS", "Emulator ZS", "Full FT", "Emulator FT", "Plug-in", "Recovered")
    ]


def test_an_emulator_that_is_the_base_loses_nothing():
    both = models(whole)
    questions = tokenize_audit(*map(rows_from, (records(0, 9), records(100, 104, choices=False))), TOKENIZER, QUICK)
    found = audit(both, questions, replace(QUICK, recovery=True, membership=True))
    scores = {name: one.scores for name, one in found.conditions.items()}
    for twin, other in (("emulator_zs", "full_zs"), ("plug_in", "full_ft"), ("emulator_ft", "full_ft")):
        assert scores[twin].nll.tolist() == scores[other].nll.tolist()
        assert scores[twin].correct.tolist() == scores[other].correct.tolist()
    assert found.accuracy == "exact_match"
    one = found.comparisons["nll"]
    assert (one.delta.value, one.delta.low, one.delta.high) == (0, 0, 0)
    assert (one.gain_share.value, one.gain_share.low, one.gain_share.high) == (1, 1, 1)
    assert found.cosine.per_layer == pytest.approx([1, 1], abs=1e-12)
    assert (found.shares.middle, found.shares.whole) == (1, 1)


def test_all_tunings_see_the_same_rows_in_the_same_order(monkeypatch):
    seen = {}
    step = SiftTrainer.training_step

    def recording(self, model, inputs, *args):
        seen.setdefault(self, []).append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(SiftTrainer, "training_step", recording)
    audit(models(), rows(False), replace(QUICK, recovery=True))
    first, second, third = seen.values()
    assert first == second == third
    assert len(first) == 3
    shown = [row for inputs in first for row in inputs]
    assert len({tuple(row) for row in shown}) == 12  # steps for 12 of the 20 rows: none of them twice


def test_the_same_seed_gives_the_same_audit_and_leaves_the_generators_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = audit(models(), rows(False), QUICK).to_dict(rows=True)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.rand(3)
    assert audit(models(), rows(False), QUICK).to_dict(rows=True) == first
    other = audit(models(), rows(False), replace(QUICK, seed=1)).to_dict(rows=True)
    assert other["conditions"]["full_ft"]["nll"] != first["conditions"]["full_ft"]["nll"]
    assert other["conditions"]["full_zs"]["rows"] == first["conditions"]["full_zs"]["rows"]


def test_what_is_left_out_is_not_there(audited):
    found = audit(models(), rows(False), QUICK)
    assert found.membership is None
    assert "recovered" not in found.conditions
    assert all(one.recovery is None for one in found.comparisons.values())


def test_a_return_takes_the_place_of_tuning():
    both = models()
    sent = {name: t + 0.01 for name, t in read_outer(both.base, SPLIT).items()}
    found = audit(both, rows(False), replace(QUICK, membership=True), sent)
    for model, name in ((both.emulator, "emulator_ft"), (both.base, "plug_in")):
        changed = copy.deepcopy(model)
        for number in (0, -1):
            for p in changed.model.layers[number].parameters():
                p.data += 0.01
        np.testing.assert_allclose(found.conditions[name].scores.nll, losses(changed, rows().held_out), rtol=2e-5)
    assert found.membership.members == 20  # though the steps suffice for 12
    assert found.facts["returned"]


def test_a_rounded_emulator_starts_from_the_base_s_own_outer_layers():
    both = models(whole)
    both.emulator.bfloat16().float()
    before = snapshot(both.emulator)
    found = audit(both, rows(False), QUICK)
    assert same(both.emulator, before)
    exact = copy.deepcopy(both.emulator)
    wanted = losses(moved(both.base, exact), rows().held_out)
    np.testing.assert_allclose(found.conditions["emulator_zs"].scores.nll, wanted, rtol=2e-5)


def test_an_overfitted_return_gives_its_rows_away():
    settings = replace(QUICK, steps=30, lr=1e-2, batch_size=8, membership=True)
    generator = random.Random(1)
    letters = [["".join(generator.choices("abcdefgh", k=5)) for _ in range(2)] for _ in range(32)]
    made = rows_from([{"prompt": prompt, "completion": completion} for prompt, completion in letters])
    data = replace(tokenize_audit(made[:8], made[8:], TOKENIZER, settings), questions=None)
    both = models(whole)
    found = audit(both, data, settings)
    assert found.accuracy is None
    assert list(found.comparisons) == ["nll"]
    assert found.membership.loss.auc.value > 0.95
    assert found.membership.reference.auc.value > 0.95
    untuned = audit(both, data, replace(settings, steps=1), read_outer(both.base, SPLIT)).membership
    assert untuned.loss.auc.low < 0.5 < untuned.loss.auc.high
    same = untuned.reference.auc
    assert same.value == same.low == same.high == 0.5


def test_held_out_rows_that_are_training_rows_are_left_out():
    parts = rows_from(records(0, 8)), rows_from([*records(6, 8), *records(100, 103)])
    data = tokenize_audit(*parts, TOKENIZER, QUICK)
    found = audit(models(), data, replace(QUICK, membership=True)).membership
    assert (found.members, found.others, found.left_out) == (8, 3, 2)
    both = models()
    data = tokenize_audit(parts[0], parts[0][2:4], TOKENIZER, QUICK)
    with pytest.raises(DataError, match="every held-out row is a training row"):
        audit(both, data, replace(QUICK, membership=True))


def test_draws_of_rows():
    assert drawn(range(5), 5, 0) == [0, 1, 2, 3, 4]
    some = drawn(range(10, 60), 20, 0)
    assert some == sorted(set(some))
    assert (len(some), some[0] >= 10, some[-1] < 60) == (20, True, True)
    assert drawn(range(10, 60), 20, 0) == some != drawn(range(10, 60), 20, 1)
    data = rows()
    assert not_among(data.held_out, data.train) == list(range(8))
    assert not_among(data.train, data.train.select([3, 5])) == [i for i in range(20) if i not in (3, 5)]
