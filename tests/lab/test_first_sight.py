"""The score of siftune 0.1, which the laboratory keeps as a rival."""

import numpy as np
import pytest

from lab.rows.first_sight import by_row


def test_scores_of_kinds_and_visits_are_means_in_deviations(monkeypatch):
    monkeypatch.setattr("lab.rows.first_sight.WINDOW", 2)
    rows = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    kinds = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    losses = np.array([1.0, 3.0, 10.0, 12.0, 0.0, 4.0, 5.0, 8.0])
    # medians by kind and step: 2 and 11, then 2 and 6.5
    apart = np.array([(-1 - 2) / 2, (1 + 2) / 2, (-1 - 1.5) / 2, (1 + 1.5) / 2])
    sizes = 1.4826 * np.array([1.5, 1.5, 1.25, 1.25])
    assert by_row(rows, losses, np.repeat([0, 1], 4), kinds) == pytest.approx(apart / sizes)


def test_a_trend_does_not_count():
    steps = np.repeat(np.arange(100), 16)
    losses = 5.0 - 0.04 * steps + np.random.default_rng(0).normal(0, 0.2, len(steps))
    losses[1500] += 1.5  # less than the loss of any early row
    assert by_row(np.arange(1600), losses, steps, np.zeros(1600, dtype=int)).argmax() == 1500
