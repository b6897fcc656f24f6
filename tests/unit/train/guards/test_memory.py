"""Out of memory: the message, and a resumed run with fewer rows in a pass and as many in a step."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.tiny_run import choices_of, recipe

from siftune.base.environment import ran_out
from siftune.train.guards.memory import OutOfMemory, halved, memory_faults
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)


def of_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of …")


def of_processor():
    torch.empty(2**55, dtype=torch.uint8)  # torch's own allocator, in its own words


def of_its_c():
    raise RuntimeError("std::bad_alloc")


@pytest.fixture
def small_memory(monkeypatch):
    """Return a function after which passes of more than some rows fail from some step on."""

    def holds(most, step=1, fail=of_device):
        plain = SiftTrainer.training_step

        def training_step(self, model, inputs, *rest):
            if len(inputs["labels"]) > most and self.state.global_step + 1 >= step:
                fail()
            return plain(self, model, inputs, *rest)

        monkeypatch.setattr(SiftTrainer, "training_step", training_step)

    return holds


def test_the_sentence_names_what_takes_less(base, rows, tmp_path, small_memory):
    small_memory(2, step=3)
    with pytest.raises(OutOfMemory) as failed:
        train(recipe(base, rows, tmp_path / "run"), QUIET)
    said = str(failed.value)
    assert "memory ran out (" in said
    assert "with 4 rows of up to 64 tokens" in said
    assert "--batch-size 2 --accumulate 2, --checkpointing, a smaller --max-length" in said
    assert "; so far, the adapter after step 2" in said
    assert "\n" not in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"


def test_it_resumes_as_the_same_run_in_smaller_passes(base, rows, tmp_path, small_memory):
    settings = {"save_every": 2, "batch_size": 8, "steps": 4}
    whole = train(recipe(base, rows, tmp_path / "whole", **settings), QUIET)
    small_memory(2, step=3)
    with pytest.raises(OutOfMemory, match=r"run` continues from there"):
        train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    smaller = {**settings, "batch_size": 2, "accumulate": 4}
    done = train(recipe(base, rows, tmp_path / "run", resume=True, **smaller), QUIET)
    assert done.summary["steps"] == 4
    drawn = [[choice["layers"] for choice in choices_of(tmp_path / name)] for name in ("run", "whole")]
    assert drawn[0] == drawn[1]
    ours, theirs = (load_file(run.folder.adapter / "adapter_model.safetensors") for run in (done, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    steps = sorted(int(path.name[11:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == [2, 4]


def test_where_a_single_row_is_too_much_it_says_so(base, rows, tmp_path, small_memory):
    small_memory(0)
    with pytest.raises(OutOfMemory, match=r"with 1 row .* --checkpointing, a smaller --max-length"):
        train(recipe(base, rows, tmp_path / "run", method="dense", batch_size=1), QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "batch", "accumulate", "found"),
    [
        ("dense", 16, 1, (8, 2)),
        ("dense", 3, 2, (1, 6)),
        ("dense", 9, 2, (3, 6)),
        ("dense", 1, 8, None),
        ("gast", 4, 1, (2, 2)),
        ("gast", 3, 1, None),
    ],
)
def test_half_of_the_rows_and_as_many_in_a_step(base, rows, tmp_path, method, batch, accumulate, found):
    half = halved(recipe(base, rows, tmp_path, method=method, batch_size=batch, accumulate=accumulate))
    assert (half and (half.batch_size, half.accumulate)) == found


@pytest.mark.parametrize("fail", [of_processor, of_its_c])
def test_allocators_fail_in_words_of_their_own(base, rows, tmp_path, fail):
    with pytest.raises(OutOfMemory), memory_faults(recipe(base, rows, tmp_path)):
        fail()


def test_other_errors_pass_as_they_are(base, rows, tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), memory_faults(recipe(base, rows, tmp_path)):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 8.01 GB, max allowed: 9.07 GB)",
    ],
)
def test_messages_of_accelerators(message):
    assert ran_out(RuntimeError(message))
    assert not ran_out(RuntimeError("CUDA error: device-side assert triggered"))
