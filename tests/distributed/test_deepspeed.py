"""DeepSpeed's ZeRO is DDP: the same choices and weights, of every method; and what it cannot give is refused.

DeepSpeed is imported by accelerate and PEFT wherever it is installed, so the ranks may have an environment of their
own: SIFTUNE_DEEPSPEED_PYTHON.
"""

import importlib.util
import os
import sys

import pytest
import torch
from support.ranks import run

PYTHON = os.environ.get("SIFTUNE_DEEPSPEED_PYTHON") or (importlib.util.find_spec("deepspeed") and sys.executable)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not PYTHON, reason="needs DeepSpeed, or SIFTUNE_DEEPSPEED_PYTHON"),
]

KINDS = [f"{kind}, {way}" for kind in ("dora", "series", "parallel", "ia3") for way in ("ddp", "zero3")]

# name, settings and way of a run, and whether it resumes from its own checkpoint
LOOKS_AT = {
    "test_stages_1_and_2_change_no_bit": [("plain", way, False) for way in ("ddp", "zero1", "zero2")],
    "test_stage_3_divides_the_base_alone": [("plain", way, False) for way in ("ddp", "zero3")],
    "test_nor_do_accumulation_checkpointing_and_uneven_batches": [
        ("hard", way, False) for way in ("ddp", "zero2", "zero3")
    ],
    "test_a_run_goes_on_from_its_checkpoint": [
        ("plain", way, resume) for way in ("zero2", "zero3") for resume in (False, True)
    ],
    "test_a_base_that_is_divided_as_it_is_read_is_the_same": [("plain", way, False) for way in ("ddp", "loaded")],
    "test_other_adapters_stay_whole_too": [("plain", way, False) for way in KINDS],
    "test_in_half_precision_there_is_a_choice_in_every_step": [("plain", "bf16", False)],
    "test_an_optimizer_of_deepspeeds_own_chooses_rows_but_no_layers": [("plain", "own optimizer", False)],
}
SOME = ("rst", "ist+gast")


@pytest.fixture(scope="module")
def found(tmp_path_factory, request):
    """What two ranks ended with in the runs that the selected tests look at."""
    items = [item for item in request.session.items if item.originalname in LOOKS_AT and item.path == request.path]
    cells = {(item.callspec.params["name"], *way) for item in items for way in LOOKS_AT[item.originalname]}
    return run(tmp_path_factory.mktemp("zero") / "run", 2, "zero.py", python=PYTHON, runs=sorted(cells))


def assert_agree(got, wanted, atol=0.0):
    assert got["layers"] == wanted["layers"]
    assert got["samples"] == wanted["samples"]
    assert got["layers"] or got["samples"]
    for key, value in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][key], value, rtol=0.0, atol=atol)


@pytest.mark.parametrize("name", SOME)
def test_stages_1_and_2_change_no_bit(found, name):
    for rank in found:
        for way in ("zero1", "zero2"):
            got, wanted = (rank[name, "plain", one, False] for one in (way, "ddp"))
            assert_agree(got, wanted)


@pytest.mark.parametrize("name", SOME)
def test_stage_3_divides_the_base_alone(found, name):
    """It sums in another order."""
    for rank in found:
        divided, whole = (rank[name, "plain", way, False] for way in ("zero3", "ddp"))
        assert_agree(divided, whole, atol=2e-5)
        assert divided["held"] < whole["held"] / 20


@pytest.mark.parametrize("name", SOME)
def test_nor_do_accumulation_checkpointing_and_uneven_batches(found, name):
    for rank in found:
        for way, atol in (("zero2", 1e-6), ("zero3", 2e-5)):
            assert_agree(rank[name, "hard", way, False], rank[name, "hard", "ddp", False], atol)


@pytest.mark.parametrize("name", ["ist+gast"])
def test_a_base_that_is_divided_as_it_is_read_is_the_same(found, name):
    for rank in found:
        assert_agree(rank[name, "plain", "loaded", False], rank[name, "plain", "ddp", False], atol=2e-5)


@pytest.mark.parametrize("name", ["gast"])
def test_other_adapters_stay_whole_too(found, name):
    for rank in found:
        for whole, divided in zip(KINDS[::2], KINDS[1::2], strict=True):
            assert_agree(rank[name, "plain", divided, False], rank[name, "plain", whole, False], atol=2e-5)
            assert rank[name, "plain", divided, False]["held"] < rank[name, "plain", whole, False]["held"] / 4


@pytest.mark.parametrize("name", SOME)
def test_a_run_goes_on_from_its_checkpoint(found, name):
    for rank in found:
        for way in ("zero2", "zero3"):
            again, unbroken = (rank[name, "plain", way, resume] for resume in (True, False))
            assert again["layers"] == unbroken["layers"][2:]
            for key, value in unbroken["weights"].items():
                assert torch.equal(again["weights"][key], value), key


def test_one_rank_clips_by_the_gradients_of_its_step(tmp_path):
    """Stage 3 would take those of an earlier step for a layer that has none."""
    cells = [("rst", "hard", way, False) for way in ("ddp", "zero2", "zero3")]
    (alone,) = run(tmp_path / "run", 1, "zero.py", python=PYTHON, launched=True, runs=cells)
    for way, atol in (("zero2", 1e-6), ("zero3", 2e-5)):
        assert_agree(alone["rst", "hard", way, False], alone["rst", "hard", "ddp", False], atol)


@pytest.mark.parametrize("name", ["ist+gast"])
def test_in_half_precision_there_is_a_choice_in_every_step(found, name):
    for rank in found:
        done = rank[name, "plain", "bf16", False]
        assert len(done["layers"]) == len(done["samples"]) == 4
        assert all(torch.isfinite(value).all() for value in done["weights"].values())


@pytest.mark.parametrize("name", ["rst", "gast"])
def test_an_optimizer_of_deepspeeds_own_chooses_rows_but_no_layers(found, name):
    for rank in found:
        done = rank[name, "plain", "own optimizer", False]
        if name == "rst":
            assert "leave `optimizer` out" in done["refused"]
        else:
            assert len(done["samples"]) == 4
