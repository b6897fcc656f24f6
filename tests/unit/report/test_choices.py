"""Figures of the choices of layers and rows."""

import re

import numpy as np
import pytest
import torch
from support.report_runs import save_run

from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.report import show
from siftune.report.choices import zscores
from siftune.report.page import sections
from siftune.report.subjects import find_subjects
from siftune.train.folder.selections import SelectionRecord


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
    scores[3] = 1.0  # equal scores have no z-scores
    record.rows(
        SampleChoice(0, 0, tuple("abcd"), (0, 1, 2, 3), scores, scores.topk(32).indices.sort().values), range(64)
    )
    record.write()
    figures = {one.title: str(one.draw(600)) for part in sections(find_subjects([str(run)])) for one in part.figures}
    assert {*re.findall(r'<path[^>]*class="(d\d)"', figures["Importance"])} == {"d4"}
    assert "−1.0<" in figures["Importance"]
    assert "row 64" in figures["Rows and layers of one batch"]
    assert "hatch" in figures["Rows and layers of one batch"]


@pytest.mark.parametrize(
    ("followed", "words"), [(3, "The last batch of which rows were left out, at"), (4, "The last batch, at")]
)
def test_the_note_of_a_batch_says_whether_rows_were_left_out(tmp_path, followed, words):
    run = save_run(tmp_path / "run", steps=2)
    record = SelectionRecord(run, ())
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    chosen = scores.topk(followed).indices.sort().values
    record.rows(SampleChoice(0, 0, ("a", "b"), (0, 1), scores, chosen), range(4))
    record.write()
    assert words in show(run).html


def test_equal_scores_have_no_z_scores():
    scores = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    standard = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    np.testing.assert_allclose(zscores(scores), standard, rtol=1e-4, atol=1e-6)
    assert np.isnan(zscores(np.ones((2, 4)))).all()
