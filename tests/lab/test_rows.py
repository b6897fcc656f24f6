"""Which score names wrong rows: figures against loops, what is watched against one row at a time, and jobs that run."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_run import save_base
from support.trainers import adapted, train
from support.trainers import rows as token_rows

from lab.pays import pool as pools
from lab.pays.results import append
from lab.rows import metrics, report, run
from lab.rows.cells import KINDS, cell_of, plant
from lab.rows.job import compared, dropped, leave_out, scored
from lab.rows.peers import Fold, classes_of, crossed, probabilities
from lab.rows.scores import by_own_deviation, by_rank
from lab.rows.watch import Watch, margins
from siftune import RowRecord
from siftune.data.batches import Collator
from siftune.engine.groups import group_by_layer
from tests.lab.test_pays_run import SIZES, save_suite

RANKED = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=20).filter(
    lambda pairs: len({bad for _, bad in pairs}) == 2
)


@given(RANKED)
def test_figures_are_those_of_loops(pairs):
    scores, bad = np.array([s for s, _ in pairs], dtype=float), np.array([b for _, b in pairs])
    wins = [(s > t) + 0.5 * (s == t) for s, t in itertools.product(scores[bad], scores[~bad])]
    assert metrics.auroc(scores, bad) == pytest.approx(np.mean(wins))
    gained = [bad[scores >= s].mean() for s in scores[bad]]
    assert metrics.average_precision(scores, bad) == pytest.approx(np.mean(gained))
    count, rng = bad.sum(), np.random.default_rng(0)
    drawn = [bad[np.lexsort((rng.random(len(bad)), -scores))[:count]].mean() for _ in range(300)]
    assert metrics.precision(scores, bad) == pytest.approx(np.mean(drawn), abs=0.15)


def test_a_score_that_is_no_number_is_the_lowest():
    found = metrics.all_of(np.array([np.nan, 1.0, 2.0]), np.array([True, False, True]))
    assert found["auroc"] == 0.5
    assert metrics.named(np.array([np.nan, 3.0, 2.0]), np.array([True, False, True]), 2.0) == {"rows": 2, "bad": 1}


def test_ranks_within_a_step():
    assert by_rank(np.array([3.0, 1.0, 2.0, 9.0]), np.array([0, 0, 0, 1])).tolist() == [1.0, 0.0, 0.5, 0.0]


def test_distances_in_deviations_of_their_time():
    apart = np.array([1.0, -1.0, 3.0, 0.1, -0.1])
    np.testing.assert_allclose(by_own_deviation(apart, 3) * 1.4826, [1, -1, 3, 1, -1])
    np.testing.assert_allclose(by_own_deviation(apart, 9) * 1.4826, apart)


def test_what_is_watched_is_what_single_rows_give(tmp_path):
    model, data, watch = adapted(), token_rows(8), Watch()
    before = copy.deepcopy(model)
    train(
        tmp_path,
        watch,
        RowRecord(),
        model=model,
        dataset=data,
        max_steps=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-9,
    )
    found, groups = watch.columns(), group_by_layer(before)
    grads = [[] for _ in groups]
    for row in data:
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}
        before.zero_grad()
        (before(**batch).loss * 6).backward()  # each has six labels: the sum over these
        for place, group in enumerate(groups):
            grads[place].append(torch.cat([p.grad.flatten() for p in group.parameters.values()]).double())
    first = [[int(row) for row, step in zip(found["row"], found["step"], strict=True) if step == at] for at in (0, 1)]
    norms = np.array([sum(float(g[row].square().sum()) for g in grads) ** 0.5 for row in range(8)])
    ratio = found["norm"] / norms[found["row"].astype(int)]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)  # the loss is a mean over the step's labels
    means = [sum(g[row] for row in first[0]) for g in grads]
    for at, row in enumerate(found["row"].astype(int)):
        if found["step"][at] == 1:
            cosines = [torch.cosine_similarity(g[row], mean, 0) for g, mean in zip(grads, means, strict=True)]
            assert found["mean"][at] == pytest.approx(float(sum(cosines)), rel=1e-2, abs=1e-3)
        else:
            assert found["mean"][at] == 0


def test_alignment_with_the_rest_is_that_of_a_loop():
    from lab.rows.watch import Watching
    from siftune.methods.drivers.sample_choice import Choosing

    groups = group_by_layer(adapted())
    rule, torch_grads = Watching(groups), {}
    torch.manual_seed(0)
    for group in groups:
        torch_grads[group.index] = {p: torch.randn(5, *p.shape, dtype=torch.float64) for p in group.parameters.values()}
    choosing = Choosing(0, 0, 5, 5, torch.zeros(4, 5))
    reduced = {}
    for group in reversed(groups):
        reduced |= rule.reduce(choosing, [(group, torch_grads[group.index])])
    flat = [torch.cat([part.flatten(1) for part in torch_grads[group.index].values()], 1) for group in groups]
    for row in range(5):
        others = [part.sum(0) - part[row] for part in flat]
        inner = [float(part[row] @ rest) for part, rest in zip(flat, others, strict=True)]
        cosine = [float(torch.cosine_similarity(part[row], rest, 0)) for part, rest in zip(flat, others, strict=True)]
        assert float(rule.found["inner"][row]) == pytest.approx(sum(inner))
        assert float(rule.found["cosine"][row]) == pytest.approx(sum(cosine))
        assert float(rule.found["one"][row]) == pytest.approx(cosine[2])
    for parameter, grad in reduced.items():
        torch.testing.assert_close(grad, next(g[parameter] for g in torch_grads.values() if parameter in g).sum(0))


def test_margins_are_those_of_a_loop():
    torch.manual_seed(1)
    logits, labels = torch.randn(5, 7), torch.tensor([[-100, 3, 2, 4], [-100, -100, 1, 6]])
    wanted = []
    for places, own in ((range(3), (3, 2, 4)), (range(3, 5), (1, 6))):
        each = [
            logits[p, o] - max(logits[p, other] for other in range(7) if other != o)
            for p, o in zip(places, own, strict=True)
        ]
        wanted.append(sum(each) / len(each))
    torch.testing.assert_close(margins(logits, labels), torch.stack(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_rows_are_bad_as_the_cell_says(kind, tmp_path, monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(pools, name, value)
    cell = {**cell_of(f"{kind}-30"), "rows": 40, "longest": 10**6}
    job = {"cell": cell, "seed": 3, "steps": 10, "batch": 4}
    rows = pools.make_pool(job, save_suite(tmp_path / "suite"), lambda row: 1).train
    planted = plant(rows, cell, 3)
    assert len(planted) == 40
    assert sum(row["bad"] for row in planted) == pytest.approx(12, abs=1)
    for row in planted:
        if kind in ("uniform", "near", "option", "mixed"):
            assert row["bad"] == (row["completion"] != row["answer"])
        if kind == "truncated" and row["bad"]:
            assert row["answer"].startswith(row["completion"])
            assert row["completion"] != row["answer"]
    if kind == "duplicate":
        assert len({row["prompt"] for row in planted}) == 28


def test_cells_that_are_not_there():
    with pytest.raises(ValueError, match="there is no cell 'far-15'"):
        cell_of("far-15")


def test_as_many_rows_go_in_every_arm():
    z, loss, bad = np.array([5.0, 0, 4, 0]), np.array([1.0, 9, 8, 0]), np.array([True, False, False, True])
    gone = leave_out(z, loss, bad, 0)
    assert (gone["named"], gone["loss"], gone["truth"]) == ({0, 2}, {1, 2}, {0, 3})
    assert len(gone["random"]) == 2


@pytest.fixture
def job(tmp_path, monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(pools, name, value)
    base, suite = save_base(tmp_path / "base"), save_suite(tmp_path / "suite")
    (tmp_path / "run").mkdir()
    cell = {**cell_of("uniform-30-epochs"), "longest": 64}
    method = {"name": "scores", "recipe": {"max_length": 128}}
    made = {"scenario": "scores", "cell": cell, "method": method, "model": str(base), "seed": 0}
    return {**made, "steps": 8, "batch": 4, "lr": 1e-2}, suite, tmp_path / "run"


def test_a_job_scores_and_a_job_drops_and_both_are_reported(job, tmp_path, monkeypatch, capsys):
    from lab.rows import job as module

    monkeypatch.setattr(module, "LEAST", 0.5)
    settings, suite, folder = job
    found = scored(settings, suite, folder)
    assert (found["rows"], found["bad"]) == (8, 2)
    assert {
        "row",
        "z",
        "loss",
        "local-z",
        "margin",
        "excess",
        "norm",
        "cosine",
        "mean",
        "joined",
        "aum",
        "forgetting",
    } <= set(found["scores"])
    append(tmp_path / "out.jsonl", {"job": settings, **found})
    once = {**settings, "cell": {**settings["cell"], "epochs": False}}
    append(tmp_path / "out.jsonl", {"job": once, **found})
    drop = {**settings, "scenario": "drop", "steps": 2}
    gone = dropped(drop, suite, folder)
    assert set(gone["arms"]) == {"all", "named", "loss", "random", "truth"}
    assert gone["gone"]["truth"] == {"rows": gone["bad"], "bad": gone["bad"]}
    append(tmp_path / "out.jsonl", {"job": drop, **gone})
    peers = {"rows": 8, "bad": 2, "scores": {"cleanlab": found["scores"]["z"]}}
    append(tmp_path / "out.jsonl", {"job": {**once, "scenario": "peers"}, **peers})
    assert report.main([str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "one pass" in said
    assert "| cleanlab |" in said
    assert "four passes over a quarter" in said
    assert "without the rows that are named" in said


def test_probabilities_of_classes_are_those_of_a_loop():
    model = adapted().double()
    data = token_rows(7).map(
        lambda row, at: {"length": 8 - at % 3, **{k: v[: 8 - at % 3] for k, v in row.items()}}, with_indices=True
    )
    classes = classes_of(data)
    assert classes == sorted({int(label) for row in data for label in row["labels"][2:]})
    labels, probs = probabilities(model, data, Collator(0), classes)
    for row, own, found in zip(data, labels, probs, strict=True):
        wanted = model(torch.tensor([row["input_ids"]])).logits[0].softmax(1).detach()
        assert [classes[place] for place in own] == row["labels"][2:]
        np.testing.assert_allclose(found[:, :-1], wanted[1:-1][:, classes], rtol=1e-9)
        np.testing.assert_allclose(found.sum(1), 1)


def test_in_a_pool_of_two_tasks_rows_are_scored_among_their_own(job, tmp_path, capsys):
    settings, suite, folder = job
    settings = {**settings, "cell": {**cell_of("mixed-25"), "longest": 64}}
    found = scored(settings, suite, folder)
    assert "source" in found["scores"]
    append(tmp_path / "out.jsonl", {"job": settings, **found, "named_by_source": {"rows": 4, "bad": 3}})
    assert report.main([str(tmp_path / "out.jsonl")]) == 0
    assert "| mixed-25, told by source | 1 | 4 | 75 % |" in capsys.readouterr().out


def test_what_other_tools_say_of_two_rows():
    labels = [np.array([0, 1]), np.array([1])]
    probs = [np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), np.array([[0.9, 0.05, 0.05]])]
    found = crossed(labels, probs)
    np.testing.assert_allclose(found["cross-loss"], [-(np.log(0.5) + np.log(0.8)) / 2, -np.log(0.05)])
    np.testing.assert_allclose(found["cross-least"], [-0.5, -0.05])
    np.testing.assert_allclose(found["cleanlab"], [0.5, 0.95])  # of the least likely label


def test_every_row_is_scored_by_the_model_that_did_not_see_it(job, monkeypatch):
    from lab.rows import job as module

    settings, suite, folder = job
    settings = {**settings, "scenario": "peers", "cell": {**settings["cell"], "epochs": False}, "steps": 4}
    folds = []

    class Seen(Fold):
        def run(self):
            folds.append(self)
            return super().run()

    monkeypatch.setattr(module, "Fold", Seen)
    found = compared(settings, suite, folder)
    first, second = folds
    assert (first.pool.train, first.others) == (second.others, second.pool.train)
    assert (found["rows"], first.job["steps"]) == (16, 2)
    assert set(found["scores"]) == {"cross-loss", "cross-least", "cleanlab"}


def test_jobs_are_listed(capsys):
    assert run.main(["scores", "--cells", "near-15,option-5", "--seeds", "0,1", "--list"]) == 0
    jobs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(job["seed"], job["cell"]["name"]) for job in jobs] == [
        (0, "near-15"), (0, "option-5"), (1, "near-15"), (1, "option-5"),
    ]  # fmt: skip
