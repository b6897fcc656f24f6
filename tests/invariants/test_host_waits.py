"""Waits of the host for an accelerator in the steps of a run, to the number: see `support.waits`.

If a step needs fewer, lower its number.
"""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from support.tiny_run import recipe
from support.waits import HostWaits
from torch.optim.optimizer import register_optimizer_step_post_hook

from siftune.methods import METHODS
from siftune.methods.gast.callback import AlignedSamples
from siftune.train.run import train

LAYERS = 4
FIRST, COUNT = 4, 4  # steps before those that are counted, and their number: two periods of IST, one of the log

# a new method has a line here: its settings, and the waits of the four steps. Two are unavoidable: the positions of the
# labels, and whether loss and gradients are finite. The last step writes the log, which reads the loss. Every second
# step of IST draws layers. The others are few for an accelerator: drawn rows and records of choices are on the CPU.
CASES = {
    "dense": ({}, [2, 2, 2, 3]),
    "rst": ({}, [3, 3, 3, 4]),
    "ist": ({}, [3, 19, 3, 23]),
    "gast": ({"select": 2}, [20, 20, 20, 21]),
    "gast, averaged": ({"select": 2, "support_every": 2}, [16, 21, 16, 22]),
    "gast, rest": ({"select": 2, "support": "rest"}, [16, 16, 16, 17]),
    "ist+gast": ({"select": 2, "support": "rest"}, [17, 33, 17, 37]),
}


def waits_of(base, rows, folder, method, settings):
    """Waits by line of each counted step: from one step of the optimizer to the next."""
    ends = []
    with HostWaits() as waits:
        handle = register_optimizer_step_post_hook(lambda *_: ends.append(Counter(waits.lines)))
        try:
            steps = {"steps": FIRST + COUNT + 2, "log_every": COUNT, "save_every": 1000}
            train(recipe(base, rows, folder, method=method, **steps, **settings), Console(quiet=True))
        finally:
            handle.remove()
    counted = ends[FIRST : FIRST + COUNT + 1]
    return [after - before for before, after in pairwise(counted)]


def test_every_method_has_a_case():
    assert {name.partition(",")[0] for name in CASES} == {*METHODS}


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_as_often_as_before(base, rows, tmp_path, name):
    settings, expected = CASES[name]
    steps = waits_of(base, rows, tmp_path / "run", name.partition(",")[0], settings)
    assert [sum(step.values()) for step in steps] == expected, steps


def test_a_wait_in_backward_is_noticed(base, rows, tmp_path, monkeypatch):
    score = AlignedSamples._score

    def with_wait(self, grads):
        scored = score(self, grads)
        float(scored.scores.sum())
        return scored

    monkeypatch.setattr(AlignedSamples, "_score", with_wait)
    settings, expected = CASES["gast, rest"]
    steps = waits_of(base, rows, tmp_path / "run", "gast", settings)
    assert [sum(step.values()) for step in steps] == [count + LAYERS for count in expected]


@pytest.mark.parametrize(
    ("act", "count"),
    [
        (lambda x: x + 1, 0),
        (lambda x: x[torch.tensor([0, 2])], 0),
        (lambda x: x.where(x > 1, 0), 0),
        (lambda x: x.to(torch.float64), 0),
        (lambda x: float(x[0]), 1),
        (lambda x: bool((x > 1).all()), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.masked_select(x > 1), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu"), 1),
    ],
)
def test_operations_that_are_counted(act, count):
    x = torch.arange(3.0)
    with HostWaits() as waits:
        act(x)
    assert waits.lines.total() == count
