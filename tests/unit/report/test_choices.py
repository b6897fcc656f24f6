"""The figure of the layers that trained, and the shares of followed rows."""

import re
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from support.report_runs import save_run

from siftune.base.errors import InputError
from siftune.base.json_files import read_sealed
from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.report.choices import selection
from siftune.report.subjects import read_run
from siftune.train.folder import selections
from siftune.train.folder.run_folder import SELECTIONS, RunFolder
from siftune.train.folder.selections import SelectionRecord


def section_of(run):
    return selection(read_run(run, "run"), several=False)


def shades(figure, width=1120):
    """(column, layer) -> opacity of each cell; columns and layers by their places, of the figure of 4 layers."""
    svg, cells = str(figure.draw(width)), {}
    for path, opacity in re.findall(r'<path d="([^"]*)" class="[^"]*cells" opacity="([^"]*)"', svg):
        for left, top in re.findall(r"M([0-9.]+) ([0-9.]+)H", path):
            cells[float(left), float(top)] = float(opacity)
    return cells


def record_layers(run, choices, depth=4):
    record = SelectionRecord(run, ())
    for step, layers in enumerate(choices):
        record.layers(LayerChoice(step, layers, torch.zeros(depth), step == 0))
    record.write()


def test_each_cell_is_a_layer_that_trained_in_a_step(tmp_path):
    choices = [(0, 3), (1,), (), (3,)]
    record_layers(run := save_run(tmp_path / "run", steps=4), choices)
    (figure,) = section_of(run).figures
    cells = shades(figure)
    xs, ys = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    assert np.diff(ys) == pytest.approx([34, 17])  # of the layers 3, 1 and 0, each 17 pixels high
    steps, layers = dict(zip(xs, (0, 1, 3), strict=True)), dict(zip(ys, (3, 1, 0), strict=True))
    assert {(steps[x], layers[y]) for x, y in cells} == {(step, one) for step, own in enumerate(choices) for one in own}
    assert set(cells.values()) == {1.0}
    assert figure.note == ""


def test_a_column_of_several_steps_has_the_share_of_them(tmp_path):
    """Layer 0 trains in each step, layer 1 in a half of them and layer 2 in the first; the last one in none."""
    choices = [(0, *((1,) if step % 2 else ()), *((2,) if step == 0 else ())) for step in range(400)]
    record_layers(run := save_run(tmp_path / "run", steps=4), choices)
    section = section_of(run)
    cells = shades(section.figures[0])
    ys = sorted({y for _, y in cells})
    of_layers = [[opacity for (_, y), opacity in cells.items() if y == each] for each in ys]
    assert of_layers == [[0.25], [0.5] * 100, [1.0] * 100]
    assert "4 steps" in section.figures[0].note
    assert "of 4 layers" in section.words[0]
    assert "least often 1 (50\u00a0%), 2 (0\u00a0%) and 3 (0\u00a0%)" in section.words[0]


def test_the_shares_followed_are_those_of_the_run(tmp_path):
    run = save_run(tmp_path / "run", "gast", steps=30, depth=4)
    shares = read_sealed(run / "run.json", dict[str, Any])["summary"]["followed"]
    assert shares["arithmetic"] > shares["wrong"] + 0.2  # no other figure would do
    section = section_of(run)
    assert not section.figures
    for source, share in shares.items():
        assert f"“{source}” {100 * share:.1f}\u00a0%" in section.words[0]


@pytest.mark.parametrize(
    ("followed", "words"),
    [
        ({"a": 0.25}, "on average: 25.0\u00a0%."),
        ({f"{at}": at / 10 for at in range(1, 8)}, "10.0\u00a0% to 70.0\u00a0% in 7 sources."),
    ],
)
def test_one_source_is_not_named_and_many_are_a_range(tmp_path, followed, words):
    run = save_run(tmp_path / "run", steps=2)
    RunFolder(run).write_run(status="finished", summary={"followed": followed, "resumed_step": 5})
    (text,) = section_of(run).words
    assert text.startswith("Share of the rows that a layer followed after step 5, ")
    assert text.endswith(words)


@pytest.mark.parametrize("followed", [{}, {"a": "x"}, {"a": None}, [1], "nonsense"])
def test_a_run_without_choices_has_no_section(tmp_path, followed):
    run = save_run(tmp_path / "run", steps=2)
    RunFolder(run).write_run(status="finished", summary={"followed": followed})
    assert section_of(run) is None


def test_steps_without_any_layer_have_no_figure(tmp_path):
    record_layers(run := save_run(tmp_path / "run", steps=2), [(), ()], depth=0)
    assert section_of(run) is None


LINE = {"step": 0, "layers": [0, 1], "importance": [0.0, 0.0]}


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [7000]}, {"layers": [-2]}, {"layers": [-1]}, {"layers": None}, {"layers": [0, None]},
        {"importance": [0.0] * 2000}, {"importance": None}, {"step": None}, {"step": 2},
    ],
)  # fmt: skip
def test_choices_that_no_run_makes_are_refused(tmp_path, change):
    run, schema = save_run(tmp_path / "run", steps=2), selections._schema()
    parquet.write_table(pyarrow.Table.from_pylist([LINE, LINE | {"step": 2}], schema), run / SELECTIONS)
    assert section_of(run).figures
    parquet.write_table(pyarrow.Table.from_pylist([LINE | change, LINE | {"step": 2}], schema), run / SELECTIONS)
    with pytest.raises(InputError, match=SELECTIONS):
        section_of(run)
