"""Work in progress of a kit: the states of one layer are in memory, and a killed run continues."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.emulators import base, calibration, settings
from support.tokenizer import byte_tokenizer
from torch.multiprocessing.reductions import StorageWeakRef

from siftune.base.errors import DataError, InputError, RecipeError
from siftune.base.files import only_process
from siftune.models.load import load_model
from siftune.offsite.exchange.emulate import KitOptions, emulate


def saved(folder: Path) -> str:
    """A model with its tokenizer."""
    base(vocab_size=300).float().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("allot", ["uniform", "measured"])
def test_what_goes_from_layer_to_layer_is_in_memory_for_one_layer(tmp_path, monkeypatch, allot):
    """Hidden states of two layers, in and out, and gradients of two; the folder has those of all."""
    from siftune.offsite.emulator.record import States

    alive, most = [], []
    original = States.put

    def put(self, number, batches):
        alive.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in batches)
        alive[:] = [ref for ref in alive if not ref.expired()]
        most.append(len(alive))
        original(self, number, batches)

    monkeypatch.setattr(States, "put", put)
    model = base(layers=12, vocab_size=300).float()
    choice = settings(keep=0.5, allot=allot)
    emulate(model, byte_tokenizer(), calibration(model, count=3), tmp_path / "kit", choice)
    assert len(most) > 20
    assert max(most) <= 4 * 3


SCRIPT = """
import os, signal, sys
from support.emulators import calibration, settings
from siftune.models.load import load_model
from siftune.offsite.exchange.emulate import KitOptions, emulate
name, out, what, at = sys.argv[1:]
def tell(stage, done, _):
    if stage == what and done == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
model, tokenizer = load_model(name, "float32")
emulate(model, tokenizer, calibration(model, count=5, rows=7), out, settings(keep=0.5, allot="measured"), progress=tell)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "at", "rest"),
    [("calibration", 3, 2), ("calibration", 6, 7), ("costs", 2, 8), ("compression", 2, 8)],
)
def test_a_killed_run_continues(tmp_path, what, at, rest):
    """The pass goes up five layers and down two, and on from where it was."""
    name, out = saved(tmp_path / "base"), tmp_path / "kit"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [name, str(out), what, str(at)]
    ended = subprocess.run([sys.executable, "-c", SCRIPT, *words], env=path, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    model, tokenizer = load_model(name, "float32")
    told, batches = [], calibration(model, count=5, rows=7)
    how = settings(keep=0.5, allot="measured")
    kit = emulate(model, tokenizer, batches, out, how, progress=lambda *one: told.append(one))
    assert [*tmp_path.glob(".kit*")] == []
    uncut = emulate(model, tokenizer, batches, tmp_path / "uncut", how)
    assert kit.digest == uncut.digest
    assert [done for stage, done, _ in told if stage == "calibration"] == [*range(rest, 8)]
    layers = 1 if what == "compression" else 3
    assert [done for stage, done, _ in told if stage == "compression"] == [*range(layers + 1)]


class Cut(Exception):
    """Stands in for a lost connection."""


def cut_after(what: str, at: int):
    """A progress that ends a run."""

    def tell(stage, done, _):
        if (stage, done) == (what, at):
            raise Cut

    return tell


def test_a_cut_run_continues_measuring(tmp_path, monkeypatch):
    """Layers that are measured are not run again for it, and the kit is that of a run that was not cut."""
    from siftune.offsite.emulator import plan as plans

    model, tokenizer, choice = base(vocab_size=300).float(), byte_tokenizer(), settings(keep=0.5, allot="measured")
    batches, told, measured = calibration(model), [], []
    with pytest.raises(Cut):
        emulate(model, tokenizer, batches, tmp_path / "kit", choice, progress=cut_after("costs", 2))
    original = plans.layer_costs
    monkeypatch.setattr(plans, "layer_costs", lambda *args: measured.append(1) or original(*args))
    kit = emulate(model, tokenizer, batches, tmp_path / "kit", choice, progress=lambda *one: told.append(one))
    assert [stage for stage, *_ in told if stage != "calibration"] == ["costs"] * 4 + ["compression"] * 4
    assert len(measured) == 1
    assert kit.digest == emulate(model, tokenizer, batches, tmp_path / "uncut", choice).digest


def test_unfinished_work_of_another_kit_is_refused_by_what_differs(tmp_path):
    model, tokenizer, out = base(vocab_size=300).bfloat16().float(), byte_tokenizer(), tmp_path / "kit"
    batches = calibration(model)
    with pytest.raises(Cut):
        emulate(model, tokenizer, batches, out, settings(keep=0.5), progress=cut_after("calibration", 4))
    left = sorted((file, file.read_bytes()) for file in tmp_path.rglob("*.*") if file.is_file())
    with pytest.raises(RecipeError, match="keep"):
        emulate(model, tokenizer, batches, out, settings(keep=0.7))
    with pytest.raises(RecipeError, match="the calibration"):
        emulate(model, tokenizer, batches[:1], out, settings(keep=0.5))
    with pytest.raises(RecipeError, match="the dtype"):
        emulate(model, tokenizer, batches, out, settings(keep=0.5), KitOptions(torch.bfloat16))
    with pytest.raises(RecipeError, match="the dtype to compute in"):
        emulate(copy.deepcopy(model).bfloat16(), tokenizer, batches, out, settings(keep=0.5))
    model.lm_head.weight.data += 1
    with pytest.raises(RecipeError, match="the base model is"):
        emulate(model, tokenizer, batches, out, settings(keep=0.5))
    assert left == sorted((file, file.read_bytes()) for file in tmp_path.rglob("*.*") if file.is_file())


def test_a_second_process_is_refused_before_it_changes_anything(tmp_path):
    model, tokenizer, out = base(vocab_size=300).float(), byte_tokenizer(), tmp_path / "kit"
    batches, work = calibration(model), tmp_path / ".kit.work"
    work.mkdir()
    (work / "plan.json").write_text("of another process")
    with only_process(work), pytest.raises(InputError, match="another process"):
        emulate(model, tokenizer, batches, out, settings(keep=0.5))
    assert [path.read_text() for path in work.iterdir()] == ["of another process"]


def test_work_that_has_nothing_yet_is_begun_anew(tmp_path):
    model, tokenizer, out = base(vocab_size=300).float(), byte_tokenizer(), tmp_path / "kit"
    with pytest.raises(Cut):
        emulate(model, tokenizer, calibration(model), out, settings(), progress=cut_after("calibration", 1))
    assert [*tmp_path.iterdir()] == []
    (tmp_path / ".kit.work").mkdir()  # of a run that was killed before anything was done
    emulate(model, tokenizer, calibration(model), out, settings())


def test_rows_that_cannot_be_used_leave_nothing_behind(tmp_path):
    model = base(vocab_size=300).float()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="loss on the calibration rows is nan"):
        emulate(model, byte_tokenizer(), calibration(model), tmp_path / "kit", settings())
    assert [*tmp_path.iterdir()] == []
