"""Two ranks under DDP choose what one rank chooses in their batches together, and reach its weights."""

import pytest
import torch
from support.every_method import SETTINGS, chooses_rows, trained
from support.ranks import run

from siftune.methods import METHODS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (result,) = run(tmp_path_factory.mktemp("one") / "run", 1, per_device_train_batch_size=8)
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {"ddp_find_unused_parameters": False, "activation_checkpointing": True,
         "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {
            "ddp_find_unused_parameters": True, "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
        },
    ],
    ids=["checkpointing", "accumulation"],
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


AVERAGED = {"support": "dataset", "select": 2, "support_every": 2, "score": "cosine"}
CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    ("support", "accumulate", "settings"),
    [
        ("rest", 2, CHECKPOINTING),
        ("sample", 1, {"with_ist": True}),
        ("dataset", 2, {"gast": AVERAGED, "ddp_find_unused_parameters": True}),
    ],
)
def test_two_ranks_choose_the_samples_of_one(tmp_path, support, accumulate, settings):
    """Two ranks with A batches each against one rank with 2A: the same batches, in the same order."""
    settings = {"gast": {"support": support, "select": 2}, "lr_scheduler_type": "constant", **settings}
    (alone,) = run(tmp_path / "one", 1, gradient_accumulation_steps=2 * accumulate, **settings)
    ranks = run(tmp_path / "two", 2, gradient_accumulation_steps=accumulate, **settings)
    found = {(s["step"], s["batch"]): s for one in ranks for s in one["samples"]}
    assert len(found) == len(alone["samples"]) == 6 * 2 * accumulate
    # DDP averages over ranks, so that each rank's loss is lifted by their number
    lifted = {"sample": 2.0, "rest": 4.0, "dataset": 1.0}[support]  # cosines have no length
    for wanted in alone["samples"]:
        got = found[wanted["step"], wanted["batch"]]
        assert got["layers"] == wanted["layers"]
        assert torch.equal(got["selected"], wanted["selected"])
        assert_proportional(got["scores"], wanted["scores"], lifted)
    for name, value in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-3, atol=1e-4)


def test_two_ranks_keep_what_one_keeps(tmp_path):
    """All texts are the same here: which ones a rank has is held by a test of one process."""
    settings = {"keep": {"weight": 20.0, "size": 2}, "with_ist": False}
    (alone,) = run(tmp_path / "one", 1, per_device_train_batch_size=8, **settings)
    free = run(tmp_path / "free", 1, per_device_train_batch_size=8, with_ist=False)[0]
    first, second = run(tmp_path / "two", 2, per_device_train_batch_size=4, **settings)
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(value, free["weights"][name], rtol=1e-2, atol=1e-3)


def test_ranks_exchange_columns_and_flags(tmp_path):
    first, second = run(tmp_path / "run", 2, "columns.py")
    assert torch.equal(first, second)
    assert first.tolist() == [[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]]


def assert_proportional(got, wanted, factor):
    """Equal up to a factor."""
    atol = float(wanted.abs().max()) * factor * 1e-3 + 1e-12
    torch.testing.assert_close(got, wanted * factor, rtol=1e-2, atol=atol)


def as_one(name, ranks=2):
    """Settings of one rank that takes the batches of several: layers are chosen for all, rows in each batch."""
    return {"gradient_accumulation_steps": ranks} if chooses_rows(name) else {"per_device_train_batch_size": 4 * ranks}


@pytest.fixture(scope="module")
def ones(tmp_path_factory):
    """What one rank ended with, for every method, and where its checkpoint is."""
    folder = tmp_path_factory.mktemp("ones")
    return {name: (trained(folder / name, name, **as_one(name))[0], folder / name / "checkpoint-2") for name in METHODS}


@pytest.fixture(scope="module")
def both(ones, tmp_path_factory, request):
    """What two ranks ended with in the runs that the selected tests look at, and the folder of all."""
    items = [item for item in request.session.items if item.originalname in LOOKS_AT]
    cells = {(item.callspec.params["name"], *way) for item in items for way in LOOKS_AT[item.originalname]}
    runs = [(*cell, str(ones[cell[0]][1]) if cell[2] == "resumed" else None) for cell in sorted(cells)]
    folder = tmp_path_factory.mktemp("every") / "run"
    return run(folder, 2, "every_method.py", runs=runs), folder


LOOKS_AT = {
    "test_with_every_method_two_ranks_are_one": [("plain", "ddp")],
    "test_with_every_method_a_sharded_base_changes_no_bit": [("plain", "ddp"), ("plain", "fsdp")],
    "test_nor_does_it_with_accumulation_checkpointing_and_uneven_batches": [("hard", "ddp"), ("hard", "fsdp")],
    "test_with_every_method_a_run_goes_on_with_another_number_of_ranks": [("plain", "fsdp"), ("plain", "resumed")],
}


def assert_runs_agree(got, wanted, rtol=0.0, atol=0.0):
    """The same choices, and gradients and weights as close as is said."""
    assert got["layers"] == wanted["layers"]
    assert got["samples"] == wanted["samples"]
    for what in ("gradients", "weights"):
        assert got[what].keys() == wanted[what].keys()
        for key, value in wanted[what].items():
            torch.testing.assert_close(got[what][key], value, rtol=rtol, atol=atol)


def is_one(ranks, alone):
    """Several ranks together are one: choices, gradients, weights."""
    first, *others = ranks
    samples = dict(first["samples"])
    for other in others:
        assert_runs_agree({**other, "samples": None}, {**first, "samples": None})
        assert not samples.keys() & other["samples"].keys()
        samples |= other["samples"]
    assert_runs_agree({**first, "samples": samples, "weights": {}}, {**alone, "weights": {}}, atol=1e-6)
    for key, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_with_every_method_two_ranks_are_one(ones, both, name):
    is_one([found[name, "plain", "ddp"] for found in both[0]], ones[name][0])


SOME = ("dense", "rst", "ist+gast")


@pytest.mark.parametrize("name", SOME)
def test_with_every_method_a_sharded_base_changes_no_bit(both, name):
    for found in both[0]:
        assert_runs_agree(found[name, "plain", "fsdp"], found[name, "plain", "ddp"])


@pytest.mark.parametrize("name", ["ist+gast"])
def test_nor_does_it_with_accumulation_checkpointing_and_uneven_batches(both, name):
    for found in both[0]:
        assert_runs_agree(found[name, "hard", "fsdp"], found[name, "hard", "ddp"])


@pytest.mark.parametrize("name", SOME)
def test_with_every_method_a_run_goes_on_with_another_number_of_ranks(tmp_path, ones, both, name):
    ranks, folder = both
    checkpoint = folder / name / "plain" / "fsdp" / "checkpoint-2"
    fewer, _ = trained(tmp_path, name, resume=str(checkpoint), **as_one(name))
    more = [found[name, "plain", "resumed"] for found in ranks]
    layers = ones[name][0]["layers"][2:]
    for found in (fewer, *more):
        assert found["layers"] == layers
        for key, value in ones[name][0]["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=1e-3, atol=1e-4)


def test_four_ranks_are_one(tmp_path):
    runs = [(name, kind, way, None) for name in ("dense", "ist+gast") for kind in SETTINGS for way in ("ddp", "fsdp")]
    ranks = run(tmp_path / "four", 4, "every_method.py", runs=runs)
    for name in ("dense", "ist+gast"):
        alone, _ = trained(tmp_path / name, name, **as_one(name, 4))
        is_one([found[name, "plain", "ddp"] for found in ranks], alone)
        for found in ranks:
            for kind in SETTINGS:  # sums of more than two ranks' numbers depend on their order in the last bits
                got, wanted = found[name, kind, "fsdp"], found[name, kind, "ddp"]
                assert_runs_agree({**got, "weights": {}}, {**wanted, "weights": {}}, atol=1e-6)
                for key, value in wanted["weights"].items():
                    torch.testing.assert_close(got["weights"][key], value, rtol=1e-3, atol=1e-4)
