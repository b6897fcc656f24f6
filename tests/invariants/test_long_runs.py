"""Nothing piles up: after its first steps, a run holds as many tensors, objects and open files as later on."""

import gc
import os
import sys

import pytest
import torch
from support.every_method import built
from support.trainers import adapted, arguments, rows
from transformers import TrainerCallback

from siftune.train.trainer import SiftTrainer

EARLY, LATE = range(20, 26), range(40, 46)  # all layers have trained by then, so the optimizer has all of its state


class Counts(TrainerCallback):
    """Counts, after every step, what is alive."""

    def __init__(self):
        self.found = {}

    def on_step_end(self, _, state, *__, **___):
        if state.global_step - 1 not in (*EARLY, *LATE):
            return
        gc.collect()
        everything = gc.get_objects()
        tensors = [thing for thing in everything if isinstance(thing, torch.Tensor)]
        files = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
        self.found[state.global_step - 1] = {
            "objects": len(everything),
            "tensors": len(tensors),
            "numbers": sum(t.numel() for t in tensors),
            "files": files,
        }


def most(found, steps, what):
    return max(found[step][what] for step in steps)


@pytest.fixture
def fresh():
    """Leave out of sight what is there already, which takes long to count."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", ["dense", "ist+gast"])
@pytest.mark.usefixtures("fresh")
def test_nothing_piles_up(name, tmp_path):
    counts = Counts()
    methods = built(name) if name != "dense" else []
    for method in methods:
        method.on_select = None  # the choices that it kept for other tests
    settings = {"max_steps": LATE.stop, "logging_strategy": "no", "lr_scheduler_type": "constant"}
    SiftTrainer(adapted(), arguments(tmp_path, **settings), train_dataset=rows(), callbacks=[*methods, counts]).train()
    for what in ("tensors", "numbers", "files"):
        assert most(counts.found, LATE, what) <= most(counts.found, EARLY, what), what
    assert most(counts.found, LATE, "objects") <= most(counts.found, EARLY, "objects") + LATE.start - EARLY.start
