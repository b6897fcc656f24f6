"""A checkpoint is taken for whole only where every file is as it was written, wherever writing was cut off."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_run import recipe

from siftune.train.folder import saving
from siftune.train.folder.checkpoints import SEAL, begin, fault_of, is_complete, newest_checkpoint, seal
from siftune.train.run import train

FILES = {
    "adapter_model.safetensors": b"weights",
    "optimizer.pt": b"moments",
    "scheduler.pt": b"rate",
    "rng_state.pth": b"",
    "trainer_state.json": b'{"global_step": 4}',
}


@pytest.fixture
def checkpoint(tmp_path):
    place = tmp_path / "checkpoint-4"
    begin(place)
    for name, data in FILES.items():
        assert not is_complete(place)
        (place / name).write_bytes(data)
    seal(place)
    return place


def test_it_is_whole_once_it_is_sealed(checkpoint):
    assert is_complete(checkpoint)
    assert json.loads((checkpoint / SEAL).read_text()).keys() == FILES.keys()
    (checkpoint / "note.txt").write_text("somebody's own")
    assert is_complete(checkpoint)


@pytest.mark.parametrize("name", [*FILES, SEAL])
def test_every_change_of_every_file_is_found(checkpoint, name):
    path = checkpoint / name
    data = path.read_bytes()
    changes = {"longer": data + b"\0", "cut": data[:-2], "flipped": bytes(byte ^ 1 for byte in data[:1]) + data[1:]}
    for what, changed in changes.items():
        path.write_bytes(changed)
        assert is_complete(checkpoint) == (changed == data), what
    path.unlink()
    assert name in fault_of(checkpoint)


@pytest.mark.parametrize(
    "listed", ["[]", "{}", '{"trainer_state.json": 3}', "[" * 100_000, "\xff", '{"../x": [1, "a"]}']
)
def test_a_list_that_is_none(checkpoint, listed):
    (checkpoint / SEAL).write_text(listed, encoding="latin-1")
    assert not is_complete(checkpoint)


@pytest.mark.parametrize(
    "state",
    [
        '{"global_step": 1e999}',
        '{"global_step": "4"}',
        '{"global_step": 0.5}',
        '{"global_step": -1}',
        '{"global_step": 4, "eval_steps": {}}',
        '{"global_step": 4, "total_flos": {}}',
        '{"global_step": 4, "log_history": [3]}',
        '{"global_step": 4, "log_history": [{"step": null}]}',
        '{"global_step": 4, "log_history": [{"step": 1, "loss": []}]}',
        '{"global_step": 4, "best_model_checkpoint": 1e999}',
        '{"global_step": 4, "stateful_callbacks": []}',
    ],
)
def test_a_state_of_another_form_is_a_fault_and_does_not_hide_the_checkpoint_before(checkpoint, state):
    before = shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-3"))
    begin(checkpoint)
    (checkpoint / "trainer_state.json").write_text(state)
    seal(checkpoint)
    assert fault_of(checkpoint)
    assert newest_checkpoint(checkpoint.parent, fresh=False) == before


def test_names_and_sizes_are_enough_where_files_are_not_read(checkpoint):
    (checkpoint / "optimizer.pt").write_bytes(b"Moments")
    assert fault_of(checkpoint, hashes=False) is None
    assert fault_of(checkpoint) == "optimizer.pt is not what was written"


class Cut(Exception):
    """Stands for the end of the process."""


def test_writing_that_is_cut_off_anywhere_leaves_none_that_looks_whole(checkpoint, monkeypatch):
    """The folder of an old checkpoint is written anew, with other values, and every call to the system is the last."""

    def rewrite():
        begin(checkpoint)
        for name, data in FILES.items():
            (checkpoint / name).write_bytes(data[::-1] if name != "trainer_state.json" else b'{"global_step": 5}')
        seal(checkpoint)

    old = checkpoint.with_name("old")
    shutil.copytree(checkpoint, old)
    for last in range(100):
        left = [last]

        def counted(call, left=left):
            def either(*args, **kwargs):
                if left[0] == 0:
                    raise Cut
                left[0] -= 1
                return call(*args, **kwargs)

            return either

        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "open"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(Path, "write_bytes", counted(Path.write_bytes))
            try:
                rewrite()
            except Cut:
                ended = False
            else:
                ended = True
        parts = {name: (checkpoint / name).read_bytes() for name in FILES if (checkpoint / name).exists()}
        if is_complete(checkpoint):
            assert parts == FILES or all(parts[name] != FILES[name] for name in FILES if FILES[name])
        if ended:
            assert is_complete(checkpoint)
            assert last > 8
            return
        shutil.rmtree(checkpoint)
        shutil.copytree(old, checkpoint)
    raise AssertionError("it was never written to its end")


def test_older_ones_go_only_when_the_new_one_is_sealed(base, rows, tmp_path, monkeypatch):
    sealed = []

    def looked(folder):
        sealed.append(sorted(path.name for path in folder.parent.iterdir() if fault_of(path) is None))
        seal(folder)

    monkeypatch.setattr(saving, "seal", looked)
    monkeypatch.setattr("siftune.train.callbacks._LEAST", 1)
    train(recipe(base, rows, tmp_path / "run", method="gast", support_every=2, steps=3))
    assert sealed == [[], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    listed = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-3" / SEAL).read_text())
    assert "gast_mean.safetensors" in listed  # what callbacks write, too


def test_there_is_no_template_of_a_card_in_it(base, rows, tmp_path):
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=1))
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "README.md").exists()
    assert "README.md" not in json.loads((folder / SEAL).read_text())


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_step_leaves_what_it_trained(base, rows, tmp_path):
    for settings in ({}, {"eval": str(rows), "eval_every": 1, "patience": 3, "lr": 1e3}):
        run = tmp_path / f"run{len(settings)}"
        given = {"method": "dense", "steps": 3, **settings}
        train(recipe(base, rows, run, **given))
        weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(run / "adapter")
        (run / "run.json").unlink()
        run = run.rename(tmp_path / f"moved{len(settings)}")  # with the best of its checkpoints
        done = train(recipe(base, rows, run, resume=True, **given))
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights
        assert (done.summary["steps"], json.loads((run / "run.json").read_text())["status"]) == (3, "finished")
        assert done.summary.get("kept_step") == (2 if settings else None)
        assert torch.isfinite(torch.tensor(done.summary["loss_last"]))
