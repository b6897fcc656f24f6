"""The rows of several owners, and what a bad one returns."""

import pytest
import torch
from support.tiny_kit import base_model, save_kit

from lab.federated import AFTER_TRAINING, _shards, place, spoiled
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange.returned import Tuned, is_thin


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 5, 8, 9])
def test_every_row_has_one_owner(owners):
    tasks = [[{"task": task, "row": row} for row in range(24)] for task in range(4)]
    found = _shards(tasks, owners)
    assert len(found) == owners
    rows = [(row["task"], row["row"]) for shard in found for row in shard]
    assert len(set(rows)) == len(rows)
    assert set(rows) == {(task, row) for task in range(4) for row in range(24)}
    for shard in found:
        assert owners > 4 or len({row["task"] for row in shard}) in (4 // owners, -(-4 // owners))
        assert owners <= 4 or len({row["task"] for row in shard}) == 1


@pytest.mark.parametrize("kind", ["whole", "thin"])
@pytest.mark.parametrize("how", ["flipped", "random"])
def test_a_bad_return_is_as_long_as_it_is_asked_to_be(tmp_path, kind, how):
    kit, base = save_kit(tmp_path / "kit"), base_model()
    state, generator = base.state_dict(), torch.Generator().manual_seed(0)
    before = {neutral: state[name] for neutral, name in outer_names(base, kit.manifest.split).items()}
    returned = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in before.items()}
    if kind == "thin":
        name = "first.0.self_attn.q_proj.weight"
        returned = {f"{name}.up": torch.ones(32, 2), f"{name}.down": torch.randn(2, 32, generator=generator)}
    bad = spoiled(before, returned, how, 3.0, seed=1)
    assert is_thin(bad) == (kind == "thin")
    assert bad.keys() == returned.keys()
    good, found = ({n: Tuned(before, r)[n].double() - before[n].double() for n in before} for r in (returned, bad))
    for name, update in good.items():
        assert float(found[name].norm()) == pytest.approx(3 * float(update.norm()), rel=1e-3)
        if float(update.norm()):
            cosine = float(torch.cosine_similarity(found[name].flatten(), update.flatten(), dim=0))
            assert cosine == pytest.approx(-1, abs=1e-3) if how == "flipped" else abs(cosine) < 0.6


def test_trainings_are_shared_by_jobs_that_differ_after_them_alone(tmp_path):
    job = {"seed": 0, "owners": 4, "merge": "mean", "bad": None, "bad_size": None, "rounds": 1, "lr": 1e-3}
    first = place(tmp_path, job, AFTER_TRAINING)
    for name, value in {"merge": "trimmed", "bad": "flipped", "bad_size": 10.0, "rounds": 2}.items():
        assert place(tmp_path, {**job, name: value}, AFTER_TRAINING) == first
        assert place(tmp_path, {**job, name: value}) != place(tmp_path, job)
    for name, value in {"seed": 1, "owners": 8, "lr": 2e-3}.items():
        assert place(tmp_path, {**job, name: value}, AFTER_TRAINING) != first
