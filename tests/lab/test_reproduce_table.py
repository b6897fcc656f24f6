"""Figures and intervals of the tables: against plain means, and a slow bootstrap."""

import numpy as np
import pytest

from lab.reproduce.answers import Answers, Scores
from lab.reproduce.table import AVERAGE, DIFFERENCE, Line, results, tables

TASKS = {"one": 40, "two": 40}  # as many: one seed for both would draw them alike
RNG = np.random.default_rng(3)


def saved(folder, name, shift=0.0, metric="likeliest"):
    """A line's file for each task; with weights for nats."""
    files = {}
    for task, count in TASKS.items():
        files[task] = Answers(folder / name / f"{task}.json")
        if metric == "nats":
            scores = Scores((RNG.random(count) * 9).tolist(), RNG.integers(1, 9, count).astype(float).tolist())
        else:
            scores = Scores((RNG.random(count) + shift > 0.6).astype(float).tolist(), [1.0] * count)
        files[task].add({metric: scores}, ())
    return files


def values(files, task, metric="likeliest"):
    return np.array(files[task].scores(metric).values)


def test_figures_are_means_over_questions_and_seeds_and_differences_are_paired(tmp_path):
    dense = [saved(tmp_path, f"dense{seed}") for seed in range(2)]
    other = [saved(tmp_path, f"other{seed}", shift=0.2) for seed in range(2)]
    found = results([Line("dense", dense), Line("other", other, "dense")], [*TASKS], ["likeliest", "generated"])
    assert list(found) == ["likeliest"]
    lines = found["likeliest"]
    assert DIFFERENCE not in lines["dense"]
    means = {name: [np.mean([values(one, task) for one in seeds], axis=0) for task in TASKS]
             for name, seeds in (("dense", dense), ("other", other))}  # fmt: skip
    for name in means:
        for task, mean in zip(TASKS, means[name], strict=True):
            figure = lines[name][task]
            assert figure["value"] == pytest.approx(mean.mean())
            assert (figure["seeds"], figure["questions"]) == (2, TASKS[task])
        assert lines[name][AVERAGE]["value"] == pytest.approx(np.mean([mean.mean() for mean in means[name]]))
    deviation = np.std([values(one, "one").mean() for one in dense], ddof=1)
    assert lines["dense"]["one"]["deviation"] == pytest.approx(deviation)

    generator, draws = np.random.default_rng(0), []
    for _ in range(4000):  # each task's questions are drawn by themselves, and the same ones of both
        parts = []
        for dense_mean, other_mean in zip(*means.values(), strict=True):
            rows = generator.integers(0, len(dense_mean), len(dense_mean))
            parts.append(other_mean[rows].mean() - dense_mean[rows].mean())
        draws.append(np.mean(parts))
    figure = lines["other"][DIFFERENCE]
    assert figure["value"] == pytest.approx(lines["other"][AVERAGE]["value"] - lines["dense"][AVERAGE]["value"])
    assert [figure["low"], figure["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.015)


def test_nats_are_per_token_and_a_line_without_all_tasks_has_no_average(tmp_path):
    whole, part = (saved(tmp_path, name, metric="nats") for name in ("whole", "part"))
    part["two"].path.unlink()
    lines = results([Line("whole", [whole]), Line("part", [part], "whole")], [*TASKS], ["nats"])["nats"]
    scores = whole["one"].scores("nats")
    assert lines["whole"]["one"]["value"] == pytest.approx(sum(scores.values) / sum(scores.weights))
    assert lines["whole"]["one"]["deviation"] is None
    assert set(lines["part"]) == {"one"}
    assert AVERAGE in lines["whole"]


def test_tables_have_a_column_of_each_task_and_the_differences():
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    found = {
        "generated": {"dense": {"one": figure | {"deviation": 0.1}, "two": figure, AVERAGE: figure}},
        "nats": {"ist": {"one": figure, "two": figure, AVERAGE: figure, DIFFERENCE: figure}},
    }
    first, second = tables("suite-model", found, {"one": "One", "two": "Two"}, "dense")
    assert first.header == second.header == ["", "One", "Two", "average", "− dense"]
    assert first.rows == [
        ["dense, here", "50.0 (25.0 to 75.0) ±10.0", "50.0 (25.0 to 75.0)", "50.0 (25.0 to 75.0)", ""],
    ]
    assert second.rows == [["ist, here", *["0.500 (0.250 to 0.750)"] * 4]]
    assert tables("suite-model", found, {"one": "One"}, None)[1].header == ["", "One", "average"]
