"""What is said of a learning-rate sweep: the table, the best rates, where to look further, the picture."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from siftune.report.lr import Best, advice, bests, draw, table, to_dict, write_report
from siftune.report.picture import png
from siftune.report.table import plain_table
from siftune.train.rates.grid import LRRun
from siftune.train.rates.sweep import LRFolder

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
        ({1e-3: None}, "gast: every rate diverged: extend --rates to 2.5e-4,5e-4"),
        (
            {1e-3: 2.0},
            "--method gast --lr 1e-3   held-out loss 2.0000, no better than before training; the only rate tried: "
            "add --rates 5e-4,2e-3",
        ),
    ],
)
def test_the_line_to_copy(losses, line):
    assert advice(runs("gast", losses), BASE) == [line]


def test_the_files_hold_all_of_it(tmp_path):
    folder = LRFolder(tmp_path / "sweep")
    folder.begin({})
    folder.set_state(heldout_loss=BASE)
    found = [*runs("dense", INSIDE), *runs("gast", UPWARDS)]
    for run in found:
        folder.append("results.jsonl", asdict(run))
    result = write_report(folder)
    assert json.loads((folder.path / "results.json").read_text()) == result == to_dict(found, BASE)
    assert result["best"]["gast"] == {
        "method": "gast", "lr": 5e-4, "heldout_loss": 1.0, "edge": "lowest", "extend": [1.25e-4, 2.5e-4],
        "flags": "--method gast --lr 5e-4",
    }  # fmt: skip
    page = (folder.path / "results.md").read_text()
    assert "| dense | 1.5000 | * 1.2500 | 1.7500 |" in page
    assert "Before training the loss is 2.0000." in page
    assert "- --method dense --lr 1e-3   held-out loss 1.2500" in page
    assert (folder.path / "results.png").read_bytes() == png(draw(found, BASE))


def drawn(figure):
    """What a picture shows: method -> its line; marker of the points -> where they are; the horizontal line."""
    (axes,) = figure.axes
    lines = {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axes.lines}
    flat = lines.pop("before training", None)
    sizes = {16: "inside", 60: "edge"}
    points = {"inside": [], "edge": []}
    for part in axes.collections:
        points[sizes[int(part.get_sizes()[0])]] += list(map(tuple, part.get_offsets().tolist()))
    return axes, lines, points, flat


def test_the_picture_has_a_line_for_each_method_and_a_point_for_each_run():
    found = [*runs("dense", INSIDE), *runs("dense", {5e-4: 1.0}, seed=1), *runs("gast", {5e-4: 1.75, 1e-3: 1.5})]
    axes, lines, points, flat = drawn(draw(found, BASE))
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5e-4", "1e-3", "2e-3"]
    assert lines == {"dense": [(5e-4, 1.25), (1e-3, 1.25), (2e-3, 1.75)], "gast": [(5e-4, 1.75), (1e-3, 1.5)]}
    assert sorted(points["inside"]) == sorted((run.lr, run.heldout_loss) for run in found)
    assert points["edge"] == []
    assert {y for _, y in flat} == {BASE}
    assert "before training: 2.000" in axes.get_title()


def test_what_is_off_the_scale_or_diverged_stands_at_the_edge():
    _, lines, points, _ = drawn(draw(runs("dense", {1e-3: 1.0, 2e-3: 30.0, 4e-3: None}), BASE))
    top = BASE + 0.3 * (BASE - 1.0)
    assert lines == {"dense": [(1e-3, 1.0), (2e-3, top)]}
    assert points == {"inside": [(1e-3, 1.0)], "edge": [(2e-3, top), (4e-3, top)]}


def test_a_base_model_far_above_does_not_press_the_lines_together():
    axes, _, points, flat = drawn(draw(runs("dense", INSIDE), 9.0))
    assert flat is None
    assert len(points["inside"]) == 3
    assert axes.get_ylim()[1] < 2


def test_nothing_but_divergence_can_be_drawn():
    _, lines, points, _ = drawn(draw(runs("dense", {1e-3: None}), BASE))
    assert (lines, points) == ({"dense": []}, {"inside": [], "edge": [(1e-3, BASE)]})
