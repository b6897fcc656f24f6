"""Tables of pays: intervals over seeds and questions by hand, what is compared with what, which rate is taken."""

import json

import numpy as np
import pytest

from lab.pays import report as tables
from lab.pays.seeds import seed_means
from siftune.evaluate.bootstrap import Bootstrap, resample


def line(method, seed, right, nll, lr=1e-3, dev=1.0, cell="mix", **found):
    job = {
        "scenario": "S1", "cell": {"name": cell, "known": 8}, "method": {"name": method}, "model": "smollm2",
        "lr": lr, "seed": seed, "steps": 120, "batch": 16,
    }  # fmt: skip
    own = {"tokens": [2] * len(nll), "dev_nats": dev, "other_nats": {"boolq": 1.5}, "processor_seconds_per_step": 1.0}
    return {"job": job, "right": right, "nll": nll, **own, **found}


def cells(text, title):
    """Rows of the first table below a heading that starts with `title`, by their first column."""
    below = text[text.index(title) :].splitlines()
    start = next(i for i, one in enumerate(below) if one.startswith("|"))
    rows = []
    for one in below[start:]:
        if not one.startswith("|"):
            break
        rows.append(one.strip("| ").split(" | "))
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_two_seeds_by_hand():
    """Within a seed all questions gain the same: only the seeds vary, of which both, or one twice, are drawn."""
    values = {"a": [[2.0, 4.0], [6.0, 8.0]], "b": [[1.0, 3.0], [3.0, 5.0]]}
    means = seed_means(values, [[1.0, 1.0]] * 2)
    found = means.difference("a", "b")
    assert (found.value, found.low, found.high) == (2.0, 1.0, 3.0)
    draws = means.draws["a"] - means.draws["b"]
    assert {round(value, 9) for value in draws} == {1.0, 2.0, 3.0}
    assert np.mean(draws == 2.0) == pytest.approx(0.5, abs=0.03)


def test_one_seed_is_siftunes_bootstrap():
    rng = np.random.default_rng(0)
    a, b, weights = rng.normal(1, 1, 60), rng.normal(0, 1, 60), rng.integers(1, 4, 60).astype(float)
    ours = seed_means({"a": [a], "b": [b]}, [weights])
    theirs = resample({"a": a, "b": b}, weights, Bootstrap(resamples=4000, seed=1))
    one, other = ours.difference("a", "b"), theirs.difference("a", "b")
    assert one.value == pytest.approx(other.value)
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.04)


def test_weights_are_tokens():
    means = seed_means({"a": [[3.0, 1.0], [4.0]]}, [[1.0, 3.0], [4.0]])
    assert means.point["a"] == pytest.approx(8 / 8)
    with pytest.raises(ValueError, match="questions by seed"):
        seed_means({"a": [[1.0]]}, [[1.0, 1.0]])


def test_the_table_by_hand():
    lines = [
        line("dense", 0, [0, 1], [4.0, 4.0]),
        line("ceiling", 0, [1, 1], [2.0, 2.0], processor_seconds_per_step=0.5),
        line("gast", 0, [1, 1], [3.0, 3.0], batches={"target": 0.25}, followed={"target": 0.5, "known": 0.1, "x": 0.4},
             quarters=[{"target": 0.2}, {"target": 0.4}, {"target": 0.6}, {}], processor_seconds_per_step=1.25),
    ]  # fmt: skip
    text = tables.report(lines)
    found = cells(text, "## mix, 8 known")
    assert "One seed: intervals are over its questions alone." in text
    assert found["dense"]["right"] == "50.0"
    assert found["dense"]["nats"] == "2.000"  # 8 nats over 4 tokens
    assert found["gast"]["nats − dense"] == "-0.500 [-0.500, -0.500]"
    assert found["gast"]["right − dense"].startswith("+50.0 [+0.0, +100.0")
    assert found["gast"]["dense → ceiling"] == "50 % [50, 50]"
    assert found["gast"]["target followed"] == "60 %"
    assert (found["gast"]["time"], found["ceiling"]["time"]) == ("1.25", "0.50")
    assert found["dense"]["nats − dense"] == found["ceiling"]["dense → ceiling"] == "–"
    assert cells(text, "Rows followed")["gast"]["target by quarters of training"] == "20 40 60 –"
    assert cells(text, "Loss of other tasks")["gast"]["boolq"] == "1.500"


def test_differences_to_any_method_are_paired_too():
    lines = [line("dense", 0, [1, 1], [1.0, 1.0]), line("a", 0, [0, 1], [4.0, 4.0]), line("b", 0, [1, 1], [3.0, 3.0])]
    lines += [line("b", 1, [0, 0], [9.0, 9.0])]  # a seed that a lacks
    (found,) = (row for row in tables.differences(lines, "a").splitlines() if "| b |" in row)
    assert found.split(" | ")[-3:-1] == ["1", "+50.0 [+0.0, +100.0]"]
    assert found.endswith("| -0.500 [-0.500, -0.500] |")
    assert "| b |" not in tables.differences(lines, "c")


def test_seeds_are_paired():
    """A seed that dense lacks is left out of the comparison, and of the row."""
    lines = [line("dense", 0, [0], [4.0]), line("gast", 0, [1], [3.0]), line("gast", 1, [0], [9.0])]
    found = cells(tables.report(lines), "## mix")["gast"]
    assert (found["seeds"], found["nats"], found["nats − dense"]) == ("1", "1.500", "-0.500 [-0.500, -0.500]")


def test_the_rate_is_chosen_on_dev_rows_of_seeds_that_all_rates_have():
    """At 2e-3 seed 1, which 1e-3 lacks, is worst; on test rows 1e-3 looks best."""
    lines = [
        line("dense", 0, [0], [1.0], lr=1e-3, dev=1.0),
        line("dense", 0, [0], [2.0], lr=2e-3, dev=0.5),
        line("dense", 1, [0], [6.0], lr=2e-3, dev=9.0),
    ]
    text = tables.report(lines)
    found = cells(text, "## mix")["dense"]
    assert (found["lr, of how many"], found["seeds"], found["nats"]) == ("0.002 of 2", "2", "2.000")
    assert cells(text, "Every rate")["dense"] == {
        "method": "dense",
        "0.001": "0.0 / 0.500 (1)",
        "0.002": "0.0 / 2.000 (2)",
    }


def test_variants_of_one_name_are_kept_apart():
    first, second = line("gast", 0, [1], [3.0]), line("gast", 0, [1], [2.0])
    second["job"]["method"]["select"] = 4
    assert list(cells(tables.report([first, second]), "## mix")) == ["gast", "gast (2)"]


def test_the_overview_has_every_cell_and_the_worst():
    lines = [line(method, 0, [0], [nll], cell=cell) for method, cell, nll in (
        ("dense", "mix", 4.0), ("gast", "mix", 3.0), ("dense", "reverse", 4.0), ("gast", "reverse", 4.4),
    )]  # fmt: skip
    found = cells(tables.report(lines), "## All cells")["gast"]
    wanted = ["gast", "-0.500", "+0.200", "-0.150", "+0.200"]
    assert list(found.values()) == wanted


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no such finished jobs"):
        tables.main([str(tmp_path / "none.jsonl")])


def test_no_share_of_a_way_that_may_be_none():
    """The ceiling is better on one question and worse on another: the way there has no length to speak of."""
    lines = [
        line("dense", 0, [0, 1], [1.0, 3.0]),
        line("ceiling", 0, [1, 1], [3.0, 0.5]),
        line("gast", 0, [1, 1], [0.5, 2.5]),
    ]
    assert cells(tables.report(lines), "## mix, 8 known")["gast"]["dense → ceiling"] == "–"


def test_a_table_of_some_rates_and_methods(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    runs = [line("dense", 0, [0], [4.0]), line("dense", 1, [0], [4.0]), line("ceiling", 0, [1], [1.0])]
    runs += [{**run, "job": {**run["job"], "lr": 0.25}} for run in runs[:1]]
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    seeds = {}
    for words in ([], ["--methods", "dense"], ["--methods", "dense", "--lr", "0.25"]):
        assert tables.main([str(path), *words]) == 0
        found = cells(capsys.readouterr().out, "## mix")
        seeds[len(words)] = (list(found), found["dense"]["seeds"])
    assert seeds == {0: (["dense", "ceiling"], "1"), 2: (["dense"], "2"), 4: (["dense"], "1")}


def test_other_numbers_of_steps_are_told_beside_the_usual_ones():
    lines = [line("dense", 0, [1, 0], [2.0, 4.0]), line("cut", 0, [1, 0], [4.0, 4.0])]
    longer = line("cut", 0, [1, 1], [1.0, 1.0])
    longer["job"]["steps"] = 150
    found = cells(tables.report([*lines, longer]), "## mix, 8 known (S1, smollm2, 120 steps of 16)")
    assert {name: row["nats"] for name, row in found.items()} == {
        "dense": "1.500", "cut": "2.000", "cut, 150 steps": "0.500",
    }  # fmt: skip
    assert found["cut, 150 steps"]["right − dense"].startswith("+50.0")
