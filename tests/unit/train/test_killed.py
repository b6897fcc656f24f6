"""Runs that are killed at any moment, also inside a save, continue and end as uninterrupted ones."""

import json
import os
import random
import signal
import time
import traceback

import pytest
import torch
from rich.console import Console
from support.tiny_run import choices_of, lines, recipe

from siftune.train.folder.run_folder import RunFolder
from siftune.train.run import train

KILLS = 4  # in one run, of each kind of moment


def in_child(act):
    """Do something in a process of its own; how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_call(number):
    """Have the process killed at one of its calls that write, replace or remove files."""
    left = [number]

    def counted(call):
        def either(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return either

    for module, names in ((os, ("fsync", "replace", "unlink", "mkdir")), (torch, ("save",))):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))


def state_of(run):
    """All that a run ended with."""
    newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    moments = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    record = json.loads((newest / "trainer_state.json").read_text())
    return {
        "weights": [path.read_bytes() for path in sorted((run / "adapter").glob("*.safetensors"))],
        "moments": {key: {name: part.tolist() for name, part in value.items()} for key, value in moments.items()},
        "choices": choices_of(run),
        "methods": record["stateful_callbacks"],
        "losses": [(line["step"], line["loss"]) for line in lines(run / "metrics.jsonl") if "loss" in line],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (0, {"method": "ist+gast", "support_every": 2}),
        (1, {"method": "dense", "adapter": "full", "layers": (0, -1), "dropout": 0.0}),
        (2, {"method": "gast", "accumulate": 2}),
    ],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_is_the_unbroken_one(base, rows, tmp_path, seed, settings):
    settings = {"save_every": 1, "steps": 5, "dropout": 0.1, **settings}
    quiet = Console(quiet=True)
    begun = time.monotonic()
    train(recipe(base, rows, tmp_path / "whole", **settings), quiet)
    short = (time.monotonic() - begun) / 4  # no child gets far, however fast the machine is
    moments, killed, run = random.Random(seed), 0, tmp_path / "broken"

    def go_on():
        resume = not RunFolder(run).is_fresh()
        train(recipe(base, rows, run, resume=resume, **settings), quiet)

    def killed_in_a_call():
        die_at_call(moments.randrange(1, 50))
        go_on()

    def killed_by_the_clock():
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.1, 1.0) * short)  # its signal ends the process
        go_on()

    code = None
    while killed < 2 * KILLS and code != 0:
        code = in_child((killed_in_a_call, killed_by_the_clock)[killed % 2])
        moments.random()  # the child's draws are its own
        assert code in (-signal.SIGKILL, -signal.SIGALRM, 0), "it failed by itself"
        killed += code != 0
    assert killed >= 3
    assert code == 0 or in_child(go_on) == 0
    assert state_of(run) == state_of(tmp_path / "whole")
