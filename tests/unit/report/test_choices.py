"""Figures of the choices of layers and rows."""

import re

import numpy as np
import torch
from support.report_runs import save_run

from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.report import show
from siftune.report.choices import agreement, zscores
from siftune.report.page import sections
from siftune.report.subjects import find_subjects
from siftune.train.folder.selections import RowsOfBatch, SelectionRecord


def test_agreement_is_the_mean_over_batches_that_tell(tmp_path):
    scores = np.random.default_rng(0).normal(size=(4, 3, 8))
    scores[1, 2] = 1.0  # equal scores agree with nothing
    run = save_run(tmp_path / "run", steps=2)
    record = SelectionRecord(run, ())
    for step, one in enumerate(scores):
        chosen = torch.tensor(one).topk(4).indices.sort().values
        record.rows(SampleChoice(step, 0, ("a", "b", "c"), (0, 1, 2), torch.tensor(one), chosen), range(8))
    record.write()
    figures = {one.title: one for section in sections(find_subjects([str(run)])) for one in section.figures}
    shown = np.array(figures["Agreement of layers"].hover["values"][::-1], float)
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.nanmean([np.corrcoef(one) for one in scores], 0)
    np.fill_diagonal(wanted, np.nan)
    np.testing.assert_allclose(shown, wanted, atol=2e-3)


def test_importance_of_other_lengths_is_shown(tmp_path):
    run = save_run(tmp_path / "run", steps=2)
    record = SelectionRecord(run, ())
    for step in (0, 1):
        record.layers(LayerChoice(step, (0,), torch.ones(step + 1), True))
    record.write()
    assert "Importance" in show(run).html


def test_noise_is_pale(tmp_path):
    run = save_run(tmp_path / "run", steps=2)
    record = SelectionRecord(run, ())
    record.layers(LayerChoice(0, (0,), torch.tensor([0.02, -0.02]), True))
    scores = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    record.rows(
        SampleChoice(0, 0, tuple("abcd"), (0, 1, 2, 3), scores, scores.topk(32).indices.sort().values), range(64)
    )
    record.write()
    figures = {one.title: str(one.draw(600)) for part in sections(find_subjects([str(run)])) for one in part.figures}
    assert {*re.findall(r'<path[^>]*class="(d\d)"', figures["Importance"])} == {"d4"}
    assert "−1.0<" in figures["Importance"]
    assert "hatch" in figures["Agreement of layers"]
    assert "row 64" in figures["Rows and layers of one batch"]


def test_agreement_is_a_correlation():
    scores = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    batch = RowsOfBatch(0, 0, tuple(range(5)), (), (), scores > 0, scores)
    np.testing.assert_allclose(agreement(batch), np.corrcoef(scores), rtol=1e-5)
    few = RowsOfBatch(0, 0, (0, 1), (), (), scores[:2, :2] > 0, scores[:2, :2])
    assert agreement(few) is None
    assert np.isnan(zscores(np.ones((2, 4)))).all()
