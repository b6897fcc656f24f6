"""What is said of a learning-rate sweep: the table, the best rates, where to look further."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from siftune.report.rates import Best, advice, bests, table, to_dict, to_markdown
from siftune.report.table import plain_table
from siftune.train.rates.grid import LRResult, LRRun

BASE = 2.0


def runs(method, losses, seed=0):
    """Runs of a method: rate -> loss, None for one that diverged."""
    return [
        LRRun(method, rate, seed, loss, loss, 6, 1.0, "The loss is nan at step 2" if loss is None else None)
        for rate, loss in losses.items()
    ]


INSIDE = {5e-4: 1.5, 1e-3: 1.25, 2e-3: 1.75}
DOWNWARDS = {5e-4: 1.5, 1e-3: 1.25, 2e-3: 1.125}
UPWARDS = {5e-4: 1.0, 1e-3: 1.25, 2e-3: None}


def test_the_table_has_methods_down_rates_across_and_marks_the_best():
    found = [*runs("gast", UPWARDS), *runs("dense", {**INSIDE, 4e-3: None})]
    assert plain_table(table(found)).splitlines() == [
        "held-out loss by learning rate, nats per token",
        "method      5e-4      1e-3      2e-3      4e-3",
        "dense     1.5000  * 1.2500    1.7500  diverged",
        "gast    * 1.0000    1.2500  diverged",
    ]


def test_cells_are_means_over_seeds_with_their_deviation():
    found = [*runs("dense", {1e-3: 1.0, 2e-3: 1.5}), *runs("dense", {1e-3: 2.0, 2e-3: 1.25}, seed=1)]
    assert table(found).rows == [["dense", f"1.5000 ±{np.std([1, 2], ddof=1):.4f}", "* 1.3750 ±0.1768"]]
    more = [*found, *runs("dense", {1e-3: 0.0}, seed=2)]
    assert table(more).rows == [["dense", "* 1.0000 ±1.0000 (3)", "1.3750 ±0.1768 (2)"]]


def test_a_rate_at_which_a_run_diverged_is_not_the_best():
    found = [*runs("dense", {1e-3: 1.5, 2e-3: 1.0}), *runs("dense", {1e-3: 1.5, 2e-3: None}, seed=1)]
    assert table(found).rows == [["dense", "* 1.5000 ±0.0000", "1.0000 (1 diverged)"]]
    assert bests(found)[0].lr == 1e-3


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        (INSIDE, Best("dense", 1e-3, 1.25, None, ())),
        (DOWNWARDS, Best("dense", 2e-3, 1.125, "highest", (4e-3, 8e-3))),
        (UPWARDS, Best("dense", 5e-4, 1.0, "lowest", (1.25e-4, 2.5e-4))),
        ({1e-3: 1.0, 1e-1: 0.5}, Best("dense", 1e-1, 0.5, "highest", (0.2, 0.4))),
        ({1e-3: 1.0, 1.6e-3: 0.5}, Best("dense", 1.6e-3, 0.5, "highest", (2.56e-3, 4.1e-3))),
        ({1e-3: 0.5, 1.25e-3: 1.0}, Best("dense", 1e-3, 0.5, "lowest", (6.4e-4, 8e-4))),
        ({1e-3: 1.0}, Best("dense", 1e-3, 1.0, None, (5e-4, 2e-3))),
        ({1e-3: 1.0, 2e-3: None}, Best("dense", 1e-3, 1.0, "lowest", (2.5e-4, 5e-4))),
        ({1e-3: None, 2e-3: None}, Best("dense", None, None, None, (2.5e-4, 5e-4))),
        ({1e-3: None}, Best("dense", None, None, None, (2.5e-4, 5e-4))),
    ],
)
def test_the_best_rate_and_where_to_look_further(losses, best):
    assert bests(runs("dense", losses)) == [best]


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        (INSIDE, "--method gast --lr 1e-3   held-out loss 1.2500"),
        (
            DOWNWARDS,
            "--method gast --lr 2e-3   held-out loss 1.1250; the highest rate tried: extend --rates to 4e-3,8e-3",
        ),
        ({1e-3: None}, "gast: at every rate a run diverged: extend --rates to 2.5e-4,5e-4"),
        (
            {1e-3: 2.0},
            "--method gast --lr 1e-3   held-out loss 2.0000, no better than before training; the only rate tried: "
            "add --rates 5e-4,2e-3",
        ),
    ],
)
def test_the_line_to_copy(losses, line):
    assert advice(runs("gast", losses), BASE) == [line]


def test_the_page_and_the_record_hold_all_of_it():
    result = LRResult(BASE, [*runs("dense", INSIDE), *runs("gast", UPWARDS)])
    record = to_dict(result)
    assert record["base_heldout_loss"] == BASE
    assert record["runs"] == [asdict(run) for run in result.runs]
    assert json.loads(json.dumps(record))["best"]["gast"] == {
        "method": "gast", "lr": 5e-4, "heldout_loss": 1.0, "edge": "lowest", "extend": [1.25e-4, 2.5e-4],
        "flags": "--method gast --lr 5e-4",
    }  # fmt: skip
    page = to_markdown(result)
    assert "| dense | 1.5000 | * 1.2500 | 1.7500 |" in page
    assert "Before training the loss is 2.0000." in page
    assert "- --method dense --lr 1e-3   held-out loss 1.2500" in page
