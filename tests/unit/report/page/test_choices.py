"""Figures of what was chosen, and records of it that no run writes."""

import json
import struct

import numpy as np
import pytest
from support.report_runs import save_run

from siftune.base.errors import InputError
from siftune.report import show
from siftune.report.page.page import sections
from siftune.report.page.sections.rows import agreement, zscores
from siftune.report.page.subjects import find_subjects
from siftune.train.folder.selections import RowsOfBatch


def test_agreement_is_the_mean_over_batches_that_tell(tmp_path):
    depth, choices = 3, np.random.default_rng(0).random((4, 3, 8)) < 0.5
    choices[1, 2] = True  # a layer that follows all agrees with nothing
    run = save_run(tmp_path / "run", steps=2)
    lines = [
        {"step": i, "batch": 0, "layers": [*range(depth)], "selected": [np.flatnonzero(unit).tolist() for unit in one]}
        | {"rows": [*range(8)]}
        for i, one in enumerate(choices)
    ]
    (run / "selection.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {one.name: one for section in sections(find_subjects([str(run)])) for one in section.figures}
    shown = np.array(figures["agreement-run"].hover["values"][::-1], float)
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.nanmean([np.corrcoef(one.astype(float)) for one in choices], 0)
    np.fill_diagonal(wanted, np.nan)
    np.testing.assert_allclose(shown, wanted, atol=2e-3)


@pytest.mark.parametrize("layers", ["[1000000000]", "[-7]", '[0], "importance": [[1.0]]', "[1e999]", '["x"]'])
def test_layers_that_no_model_has_are_refused(tmp_path, layers):
    run = save_run(tmp_path / "run", steps=2)
    (run / "selection.jsonl").write_text(f'{{"step": 0, "layers": {layers}}}\n')
    with pytest.raises(InputError, match=r"selection record in .* is damaged"):
        show(run)


@pytest.mark.parametrize("units", [(0, 4), (2, 0), (2000, 1)])
def test_batches_that_no_run_has_are_refused(tmp_path, units):
    run = save_run(tmp_path / "run", steps=2)
    body = struct.pack("<IHHHHB", 0, 0, *units, 0, 0) + bytes(9999)
    (run / "selection.bin").write_bytes(b"siftsel1" + struct.pack("<cI", b"S", len(body)) + body)
    with pytest.raises(InputError, match=r"selection record in .* is damaged"):
        show(run)


def test_importance_of_other_lengths_is_shown(tmp_path):
    run = save_run(tmp_path / "run", steps=2)
    lines = ('{"step": 0, "layers": [0], "importance": [1.0]}', '{"step": 1, "layers": [0], "importance": [1.0, 2.0]}')
    (run / "selection.jsonl").write_text("\n".join(lines))
    assert "Importance" in show(run).html


def test_agreement_is_a_correlation():
    scores = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    batch = RowsOfBatch(0, 0, tuple(range(5)), (), (), scores > 0, scores)
    np.testing.assert_allclose(agreement(batch), np.corrcoef(scores), rtol=1e-5)
    few = RowsOfBatch(0, 0, (0, 1), (), (), scores[:2, :2] > 0, scores[:2, :2])
    assert agreement(few) is None
    assert np.isnan(zscores(np.ones((2, 4)))).all()
