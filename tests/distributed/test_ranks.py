"""Two ranks under DDP choose what one rank chooses in their batches together, and reach its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.every_method import NAMES, chooses_rows, trained
from support.recorded import recorded

from siftune.methods.gast.stream import _scores
from siftune.rows.visits import read_visits

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent


def run(folder, ranks, worker="worker.py", **settings):
    """Train in `ranks` processes; returns what each of them ended with."""
    folder.mkdir()
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(HERE / worker), str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (result,) = run(tmp_path_factory.mktemp("one") / "run", 1, per_device_train_batch_size=8)
    return result


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"ddp_find_unused_parameters": True}, marks=pytest.mark.matrix),
        pytest.param({"ddp_find_unused_parameters": False}, marks=pytest.mark.matrix),
        {"ddp_find_unused_parameters": False, "activation_checkpointing": True,
         "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["find unused", "no search", "checkpointing", "accumulation"],
)  # fmt: skip
def test_two_ranks_are_one(tmp_path, alone, settings):
    settings = {"per_device_train_batch_size": 4, **settings}
    first, second = run(tmp_path / "two", 2, **settings)
    assert first["layers"] == second["layers"] == alone["layers"]
    assert torch.equal(first["importance"], second["importance"])
    torch.testing.assert_close(first["importance"], alone["importance"], rtol=1e-4, atol=1e-6)
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_two_ranks_have_the_importance_that_one_has_from_gradients(tmp_path, accumulate):
    settings = {"ist": {"importance_from": "gradients"}, "max_steps": 8, "ddp_find_unused_parameters": False}
    (alone,) = run(tmp_path / "one", 1, per_device_train_batch_size=8, **settings)
    apart = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    first, second = run(tmp_path / "two", 2, **apart, **settings)
    assert first["layers"] == second["layers"] == alone["layers"]
    assert torch.equal(first["importance"], second["importance"])
    assert first["importance"].abs().max() > 0
    torch.testing.assert_close(first["importance"], alone["importance"], rtol=1e-4, atol=1e-5)


AVERAGED = {
    "support": "dataset", "select": 2, "support_every": 2, "support_decay": 0.5, "share": "above", "score": "cosine",
}  # fmt: skip
CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    ("support", "accumulate", "settings"),
    [
        pytest.param("rest", 1, {"ddp_find_unused_parameters": False}, marks=pytest.mark.matrix),
        ("rest", 2, CHECKPOINTING),
        pytest.param("momentum", 2, {"ddp_find_unused_parameters": True}, marks=pytest.mark.matrix),
        pytest.param("sample", 1, {"with_ist": True}, marks=pytest.mark.matrix),
        pytest.param("dataset", 1, {"gast": AVERAGED}, marks=pytest.mark.matrix),
    ],
)
def test_two_ranks_choose_the_samples_of_one(tmp_path, support, accumulate, settings):
    """Two ranks with A batches each against one rank with 2A: the same batches, in the same order."""
    settings = {"gast": {"support": support, "select": 2}, "lr_scheduler_type": "constant", **settings}
    (alone,) = run(tmp_path / "one", 1, gradient_accumulation_steps=2 * accumulate, **settings)
    ranks = run(tmp_path / "two", 2, gradient_accumulation_steps=accumulate, **settings)
    found = {(s["step"], s["batch"]): s for one in ranks for s in one["samples"]}
    assert len(found) == len(alone["samples"]) == 6 * 2 * accumulate
    # DDP averages over ranks, so that each rank's loss is lifted by their number, and with it the running mean
    lifted = {"sample": 2.0, "rest": 4.0, "momentum": None, "dataset": 1.0}[support]  # cosines have no length
    for wanted in alone["samples"]:
        got = found[wanted["step"], wanted["batch"]]
        assert got["layers"] == wanted["layers"]
        assert torch.equal(got["selected"], wanted["selected"])
        assert_proportional(got["scores"], wanted["scores"], lifted)
    for name, value in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-3, atol=1e-4)


def test_two_ranks_judge_rows_by_the_same_rows_as_one(tmp_path):
    """What rows are drawn differs, so the weights are held: scores and windows are those of one rank."""
    gast = {"support": "dataset", "select": 0.5, "among": "recent", "score": "cosine"}
    settings = {"gast": gast, "learning_rate": 1e-12, "lr_scheduler_type": "constant", "per_device_train_batch_size": 1}
    (alone,) = run(tmp_path / "one", 1, gradient_accumulation_steps=8, **settings)
    first, second = run(tmp_path / "two", 2, gradient_accumulation_steps=4, **settings)
    assert first["stream"] == second["stream"]
    found = {(s["step"], s["batch"]): s for one in (first, second) for s in one["samples"]}
    for wanted in alone["samples"]:
        got = found[wanted["step"], wanted["batch"]]
        torch.testing.assert_close(got["scores"], wanted["scores"], rtol=1e-3, atol=1e-5)
        assert wanted["step"] > 1 or got["selected"].tolist() == wanted["selected"].tolist() == [[0]] * 4
    for name, steps in alone["stream"]["windows"].items():
        assert len(steps) == 6
        for one, other in zip(steps, first["stream"]["windows"][name], strict=True):
            torch.testing.assert_close(_scores(other), _scores(one), rtol=1e-3, atol=1e-5)
            assert len(_scores(one)) == 8
    for ranks in ([alone], [first, second]):
        drawn = [int((s["selected"][:, :1] >= 0).sum()) for one in ranks for s in one["samples"] if s["step"] > 1]
        assert 0.3 < sum(drawn) / (4 * len(drawn)) < 0.7
    apart = [[s["selected"].tolist() for s in one["samples"] if s["step"] > 1] for one in (first, second)]
    assert apart[0] != apart[1]


def test_columns_of_ranks_that_have_different_numbers_of_them(tmp_path):
    first, second = run(tmp_path / "run", 2, "columns.py")
    assert torch.equal(first, second)
    assert first.tolist() == [[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]]


def assert_proportional(got, wanted, factor):
    """Equal up to a factor; None: any, the same for all rows."""
    scale = wanted.abs().max()
    if factor is None:
        factor = float(got.abs().max() / scale) if scale > 0 else 1.0
    torch.testing.assert_close(got, wanted * factor, rtol=1e-2, atol=float(scale) * factor * 1e-3 + 1e-12)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two ranks ended with, for every method."""
    return run(tmp_path_factory.mktemp("every") / "run", 2, "every_method.py")


@pytest.mark.parametrize("name", NAMES)
def test_with_every_method_two_ranks_are_one(tmp_path, both, name):
    first, second = (results[name] for results in both)
    parts = {"gradient_accumulation_steps": 2} if chooses_rows(name) else {"per_device_train_batch_size": 8}
    alone, _ = trained(tmp_path, name, **parts)
    assert first["layers"] == second["layers"] == alone["layers"]
    assert not first["samples"].keys() & second["samples"].keys()
    assert first["samples"] | second["samples"] == alone["samples"]
    for key, value in alone["weights"].items():
        assert torch.equal(first["weights"][key], second["weights"][key])
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-3, atol=1e-4)


def test_two_ranks_have_one_record_of_all_rows(tmp_path):
    alone, _ = recorded(tmp_path / "one", 4)
    ranks = run(tmp_path / "two", 2, "row_record.py")
    wanted, found = (read_visits(tmp_path / name / "rows.parquet").visits for name in ("one", "two"))
    assert len(found) == 64
    for name in ("row", "step", "tokens", "followed"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-3)
    half = read_visits(tmp_path / "two" / "checkpoint-2" / "rows.parquet").visits
    assert half.row.tolist() == found.row[:32].tolist()
    seen = [row for choices in ranks for rows in choices for row in rows.tolist()]
    assert sorted(seen) == sorted(row for rows in alone for row in rows.tolist()) == list(range(64))
