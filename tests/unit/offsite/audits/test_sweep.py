"""The trade-off that an owner chooses on: every emulator of a grid, measured like one by itself."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.emulators import base, calibration

from siftune.base.errors import InputError, RecipeError
from siftune.evaluate.bootstrap import Bootstrap, Estimate
from siftune.offsite.audits import sweep as module
from siftune.offsite.audits.calibration_attack import attack_calibration
from siftune.offsite.audits.gradients import gradient_cosine
from siftune.offsite.audits.sweep import SweepGrid, SweepPoint, front, sweep
from siftune.offsite.emulator.assemble import materialise
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import Split
from siftune.report.sweep import ordered, table, to_dict, write_sweep
from siftune.report.table import markdown_table

GRID = SweepGrid(
    keeps=(0.7, 0.4), lambdas=(0.0, 0.5), bases=("svd",), methods=("gradot", "layerdrop"), split=Split(1, 1)
)


def point(cosine, gap, keep=0.5, method="gradot", basis="svd", attn=0.0, mlp=0.0):
    mlps = "refit" if method == "gradot" else None
    return SweepPoint(method, keep, attn, mlp, basis, mlps, cosine, 3.0 + gap, 3.0, 1000, keep)


@pytest.fixture(scope="module")
def model():
    return base(layers=5)


@pytest.fixture(scope="module")
def rows(model):
    """Calibration rows and others."""
    batches = calibration(model, count=4)
    return batches[:2], batches[2:]


@pytest.fixture(scope="module")
def points(model, rows):
    return sweep(model, *rows, GRID)


def described(choice):
    return (choice.method, choice.keep, choice.basis, choice.lambda_attn, choice.lambda_mlp)


def test_a_grid_has_every_emulator_once():
    grid = SweepGrid(keeps=(0.5,), lambdas=(0.0, 0.2), bases=("svd",))
    assert [described(choice) for choice in grid.settings()] == [
        ("gradot", 0.5, "svd", 0.0, 0.0),
        ("gradot", 0.5, "svd", 0.2, 0.2),
        ("layerdrop", 0.5, "whitened", 0.0, 0.0),
    ]
    grid = SweepGrid(
        methods=("layerdrop", "gradot"),
        split=Split(1, 2),
        allot="uniform",
        keeps=(0.5, 0.3, 0.5),
        lambdas=(0.0,),
        bases=("svd",),
    )
    assert [(c.method, c.keep) for c in grid.settings()] == [
        ("layerdrop", 0.5),
        ("gradot", 0.5),
        ("layerdrop", 0.3),
        ("gradot", 0.3),
    ]
    assert [c.allot for c in grid.settings() if c.method == "gradot"] == ["uniform", "uniform"]
    grid = SweepGrid(keeps=(0.5,), lambdas=(0.0,), bases=("svd",), mlps=("channels", "refit"))
    assert [(c.method, c.mlp) for c in grid.settings()] == [
        ("gradot", "channels"),
        ("gradot", "refit"),
        ("layerdrop", "refit"),
    ]
    grid = SweepGrid(split=Split(1, 2))
    assert {choice.split for choice in grid.settings()} == {Split(1, 2)}
    assert len(SweepGrid().settings()) == 3 * (3 * 2 + 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keeps": ()}, "keeps is empty"),
        ({"lambdas": ()}, "lambdas is empty"),
        ({"bases": ()}, "bases is empty"),
        ({"mlps": ()}, "mlps is empty"),
        ({"keeps": (0.5, 1.5)}, r"keep is 1\.5"),
        ({"lambdas": (-1.0,)}, r"lambda_attn is -1\.0"),
        ({"lambdas": (math.nan,)}, "lambda_attn is nan"),
    ],
)
def test_a_grid_out_of_range_is_refused_before_the_work(model, values, words):
    with pytest.raises(RecipeError, match=words):
        sweep(model, [], [], SweepGrid(**values))


def test_points_are_those_of_emulators_made_and_measured_alone(model, rows, points):
    choices = GRID.settings()
    assert [(p.method, p.keep, p.lambda_attn, p.lambda_mlp) for p in points] == [
        (c.method, c.keep, c.lambda_attn, c.lambda_mlp) for c in choices
    ]
    assert [p.basis for p in points] == [c.basis if c.method == "gradot" else None for c in choices]
    assert [p.mlp for p in points] == [c.mlp if c.method == "gradot" else None for c in choices]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    outside = sum(p.numel() for p in model.parameters()) - sum(sizes[1:4])
    for choice, found in zip(choices, points, strict=True):
        emulator = materialise(emulators(model, rows[0], [choice])[0])
        alone = gradient_cosine(model, emulator, rows[1], GRID.split)
        assert (found.cosine, found.loss, found.loss_full) == (
            alone.overall, alone.loss_emulator, alone.loss_full
        )  # fmt: skip
        assert found.gap == found.loss - found.loss_full
        leak = attack_calibration(model, emulator, GRID.split, *rows, Bootstrap(2000)).strongest
        assert found.calibration_auc == (Estimate() if leak is None else leak.auc)
        assert found.parameters == sum({p.data_ptr(): p.numel() for p in emulator.parameters()}.values())
        assert found.middle_share == pytest.approx((found.parameters - outside) / sum(sizes[1:4]))
    assert len({p.cosine for p in points}) == len(points)
    assert {p.method for p in points if p.calibration_auc.value is None} == {"layerdrop"}


def test_all_kept_is_the_base(model, rows):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = []
    found = sweep(
        model,
        *rows,
        SweepGrid(keeps=(1.0,), split=Split(1, 1), bases=("svd",), lambdas=(0.0,)),
        lambda *what: told.append(what),
    )
    for one in found:
        assert one.cosine == pytest.approx(1.0, abs=1e-9)
        assert one.gap == pytest.approx(0.0, abs=1e-9)
        assert one.middle_share == 1.0
    assert [what for what in told if what[0] == "measuring"] == [("measuring", 1, 2), ("measuring", 2, 2)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_how_many_are_made_at_once_does_not_matter(model, rows, points, monkeypatch):
    passes = []
    original = module.emulators
    monkeypatch.setattr(module, "emulators", lambda *args, **more: passes.append(args[2]) or original(*args, **more))
    monkeypatch.setattr(module, "_AT_ONCE", 0.8)
    assert sweep(model, *rows, GRID) == points
    made = [choice for chunk in passes for choice in chunk]
    assert [len(chunk) for chunk in passes] == [1, 1, 1, 3]
    assert made == sorted(GRID.settings(), key=lambda choice: str(choice.form))  # what is measured once comes together
    for chunk in passes:
        assert sum(c.keep for c in chunk if c.method == "gradot") <= 0.8


def test_a_model_that_cannot_be_compressed_is_refused(rows):
    with pytest.raises(InputError, match="bloom"):
        sweep(base("bloom"), *rows, GRID)


coordinates = st.tuples(st.integers(-3, 3), st.integers(-3, 3))


@given(st.lists(coordinates, min_size=1, max_size=8))
def test_the_front_against_a_scan_from_the_widest_gap(drawn):
    """From the widest gap on, a point belongs if its cosine is above all before, or equal to its like's."""
    candidates = [point(c / 4, float(g)) for c, g in drawn]
    expected, best = [], -math.inf
    for gap in sorted({g for _, g in drawn}, reverse=True):
        highest = max(c for c, g in drawn if g == gap) / 4
        if highest > best:
            expected += [p for p in candidates if (p.gap, p.cosine) == (gap, highest)]
            best = highest
    assert front(candidates) == expected[::-1]


def test_a_point_without_a_cosine_is_on_no_front_but_in_the_table():
    candidates = [point(math.nan, 5.0), point(0.5, 1.0)]
    assert front(candidates) == [candidates[1]]
    assert ordered(candidates) == candidates[::-1]
    record = to_dict(candidates, {"model": "m"})
    assert [entry["cosine"] for entry in record["points"]] == [0.5, None]
    assert [row[8] for row in table(candidates).rows] == ["0.500", "–"]


def test_the_table_is_sorted_and_marks_the_front():
    candidates = [
        point(0.2, 0.5, keep=0.3),
        replace(point(0.6, 0.1, keep=0.7, basis="whitened", attn=0.3), calibration_auc=Estimate(0.75, 0.5, 0.9)),
        point(0.9, 0.1, keep=0.7, basis="whitened"),
        point(0.4, 2.0, keep=0.7, method="layerdrop", basis=None),
    ]
    shown = table(candidates)
    rows = [dict(zip(shown.header, row, strict=True)) for row in shown.rows]
    assert [(row["keep"], row["cosine"], row[""]) for row in rows] == [
        ("0.7", "0.900", "*"),
        ("0.7", "0.600", ""),
        ("0.7", "0.400", "*"),
        ("0.3", "0.200", ""),
    ]
    assert [(row["λ attn"], row["λ MLP"], row["basis"], row["MLP"]) for row in rows[:3]] == [
        ("0", "0", "whitened", "refit"),
        ("0.3", "0", "whitened", "refit"),
        ("", "", "", ""),
    ]
    assert [row["calibration AUC"] for row in rows] == [
        "not defined",
        "0.750 [0.500, 0.900]",
        "not defined",
        "not defined",
    ]
    assert [row["gap"] for row in rows] == ["+0.100", "+0.100", "+2.000", "+0.500"]


def test_the_folder(points, tmp_path):
    write_sweep(points, tmp_path, {"model": "tiny"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.md"]
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record == to_dict(points, {"model": "tiny"})
    assert {entry["front"] for entry in record["points"]} == {True, False}
    page = (tmp_path / "sweep.md").read_text()
    assert markdown_table(table(points)) in page
    assert "proves no privacy" in page
