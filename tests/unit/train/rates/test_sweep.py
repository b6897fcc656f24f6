"""A learning-rate sweep: its runs are those of `train`, a second call continues it, and other settings are refused."""

import gc
import json
import math
import re
import weakref
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.tiny_run import recipe, save_rows
from torch.nn.functional import cross_entropy

from siftune.base.errors import InputError, RecipeError, TrainingError
from siftune.base.files import only_process
from siftune.cli.demo_rows import arithmetic_rows
from siftune.data.read import load_rows
from siftune.methods.options import GASTSettings, ISTSettings
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import read_rows
from siftune.train import source as module
from siftune.train.prepare import prepare
from siftune.train.rates import sweep as lr_sweep
from siftune.train.rates.grid import Grid, grid_of, rate_text, recipes_of
from siftune.train.rates.sweep import open_sweep, run_missing
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)


@pytest.fixture
def held_out(tmp_path):
    """Rows that share none with the training rows, with answers of different lengths."""
    path = tmp_path / "eval.jsonl"
    rows = [{"prompt": f"{i} or {i}?", "completion": str(10 ** (i % 5))} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def plain(base, rows, held_out, tmp_path):
    """The recipe of a sweep."""
    return recipe(base, rows, tmp_path / "unused", method="dense", eval=str(held_out))


def swept(recipe, grid, out, progress=lambda *_: None):
    sweep = open_sweep(recipe, grid, out)
    return list(run_missing(sweep, progress)), sweep


def grid(*methods, rates=(1e-3, 1e-2), seeds=(0,)):
    return Grid(methods, rates, seeds)


def per_token(model, data):
    """Mean loss over label tokens, row by row, from all logits in float64."""
    total, count = 0.0, 0
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        for at, label in enumerate(labels[1:]):
            if label != -100:
                total += float(cross_entropy(logits[at], torch.tensor(label)))
                count += 1
    return total / count


# --- what a run is ---


def test_a_run_is_that_of_train_measured_on_every_token_alike(plain, tmp_path):
    runs, sweep = swept(plain, grid("ist", rates=(3e-3,), seeds=(5,)), tmp_path / "sweep")
    left = load_recipe(tmp_path / "sweep" / "ist.yaml")
    one = replace(left, lr=3e-3, seed=5, log_every=1, out=str(tmp_path / "run"))
    trained = train(one, QUIET)
    data = prepare(one, trained.tokenizer, read_rows(one)).data["eval"]
    assert runs[0].heldout_loss == pytest.approx(per_token(trained.model.eval(), data), rel=1e-6)
    assert runs[0].train_loss == trained.summary["loss_last"]
    assert (runs[0].cell, runs[0].steps, runs[0].diverged) == (("ist", 3e-3, 5), 6, None)
    base, _ = module.load_model(one.model)
    assert sweep.result.base_heldout_loss == pytest.approx(per_token(base, data), rel=1e-6)


@pytest.mark.usefixtures("restored_algorithms")
def test_bad_rows_are_named_and_algorithms_are_those_of_the_recipe(plain, rows, tmp_path, monkeypatch, caplog):
    on, step = [], SiftTrainer.training_step

    def watched(self, *args, **kwargs):
        on.append(torch.are_deterministic_algorithms_enabled())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SiftTrainer, "training_step", watched)
    rows.write_text(rows.read_text() + '{"prompt": "no completion"}\n')
    given = replace(plain, bad_rows="drop", deterministic=True, steps=1)
    swept(given, grid("dense", rates=(1e-3,)), tmp_path / "out")
    assert set(on) == {True}
    assert "1 row left out:" in caplog.messages
    assert f"{rows}:25: the column 'completion' is missing" in caplog.text


def test_a_rate_that_breaks_training_is_a_result(plain, tmp_path):
    runs, sweep = swept(plain, grid("dense", rates=(1e-3, 1e30)), tmp_path / "sweep")
    good, bad = runs
    assert good.diverged is None
    assert re.fullmatch(r"(the loss is (nan|inf)|a gradient is not finite) \(rows: .*\) at step \d", bad.diverged)
    assert (bad.heldout_loss, bad.train_loss) == (None, None)
    assert 0 < bad.steps < 6
    assert sweep.missing() == []


def test_a_held_out_loss_that_is_not_finite_is_a_divergence(plain, tmp_path, monkeypatch):
    measured = iter([1.0, math.nan])
    monkeypatch.setattr(lr_sweep, "_heldout_loss", lambda *_: next(measured))
    (run,), _ = swept(plain, grid("dense", rates=(1e-3,)), tmp_path / "sweep")
    assert (run.heldout_loss, run.train_loss) == (None, None)
    assert run.diverged == "the held-out loss is nan after step 6"


def test_a_base_model_without_a_loss_is_refused(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(lr_sweep, "_heldout_loss", lambda *_: math.inf)
    with pytest.raises(TrainingError, match=r"is inf: .*eval\.jsonl"):
        swept(plain, grid("dense"), tmp_path / "sweep")


# --- a second call ---


def test_a_sweep_that_was_cut_does_only_the_rest(plain, tmp_path):
    def stop(stage, done, total):  # as Ctrl-C does
        if stage.startswith("run 2") and done == 3:
            raise KeyboardInterrupt

    def locked(*stage):
        with pytest.raises(InputError, match="another process"), only_process(tmp_path / "whole"):
            pass
        stages.append(stage)

    stages = []
    whole, _ = swept(plain, grid("rst"), tmp_path / "whole", locked)
    assert stages
    with only_process(tmp_path / "whole"):  # the lock is gone
        pass
    with pytest.raises(KeyboardInterrupt):
        swept(plain, grid("rst"), tmp_path / "cut", stop)
    first = open_sweep(plain, grid("rst"), tmp_path / "cut").runs()
    rest, again = swept(plain, grid("rst"), tmp_path / "cut")
    assert [run.cell for run in rest] == [("rst", 1e-2, 0)]
    assert losses(first + rest) == losses(whole) == losses(again.runs())
    assert len(again.runs()) == 2


def losses(runs):
    return {run.cell: run.heldout_loss for run in runs}


def test_methods_rates_and_seeds_can_be_added_and_one_model_is_in_memory_at_a_time(plain, tmp_path, monkeypatch):
    models, load, most = weakref.WeakSet(), module.load_model, []

    def counting(*args, **options):
        model, tokenizer = load(*args, **options)
        models.add(model)
        most.append(len(models))
        return model, tokenizer

    gc.collect()
    monkeypatch.setattr(module, "load_model", counting)
    swept(plain, grid("dense", rates=(1e-3,)), tmp_path / "sweep")
    more = replace(plain, gast=GASTSettings(select=2, support="rest"), save_every=3, log_every=2)
    runs, sweep = swept(more, grid("gast", rates=(1e-2,), seeds=(0, 1)), tmp_path / "sweep")
    assert [run.cell for run in runs] == [("gast", rate, seed) for seed in (0, 1) for rate in (1e-2,)]
    assert len(sweep.runs()) == 3
    left = {path.name for path in (tmp_path / "sweep").rglob("*")}
    assert left == {"rates.json", "dense.yaml", "gast.yaml"}
    assert max(most) == 1 < len(most)
    assert not (tmp_path / "unused").exists()


# --- what is refused ---


def test_another_recipe_in_the_same_folder(base, rows, held_out, tmp_path):
    one = recipe(base, rows, tmp_path / "unused", eval=str(held_out))
    swept(one, grid("ist", rates=(1e-3,)), tmp_path / "sweep")
    for change, name in (
        ({"rank": 4}, "rank is 2"),
        ({"steps": 7}, "steps is 6"),
        ({"ist": ISTSettings(interval=3)}, r"ist\."),
        ({"model": "smollm2"}, "model is"),
    ):
        with pytest.raises(RecipeError, match=name):
            open_sweep(replace(one, **change), grid("ist"), tmp_path / "sweep")
    plain = replace(one, ist=ISTSettings())
    assert open_sweep(replace(plain, method="dense"), grid("dense"), tmp_path / "sweep").missing()


def test_other_rows_under_the_same_name_and_a_second_process_are_refused_and_change_nothing(plain, tmp_path):
    _, sweep = swept(plain, grid("dense", rates=(1e-3,)), tmp_path / "sweep")
    before = {path: path.read_bytes() for path in sweep.folder.path.iterdir()}
    with only_process(sweep.folder.path):
        for rates in ((1e-3,), (1e-2,)):
            with pytest.raises(InputError, match="another process"):
                open_sweep(replace(plain, seed=1), grid("dense", rates=rates), tmp_path / "sweep")
    for name, path in (("train", tmp_path / "rows.jsonl"), ("eval", tmp_path / "eval.jsonl")):
        text = path.read_text()
        path.write_text(text.replace("1", "3"))
        with pytest.raises(RecipeError, match=f"the {name} rows"):
            open_sweep(plain, grid("dense"), tmp_path / "sweep")
        path.write_text(text)
    assert {path: path.read_bytes() for path in sweep.folder.path.iterdir()} == before


def test_another_model_of_the_same_name_is_refused(plain, tmp_path):
    def named(digest):
        return type("Named", (module.ModelSource,), {"identity": {"kit": digest}})

    out, cells = tmp_path / "sweep", grid("dense", rates=(1e-3,))
    list(run_missing(open_sweep(plain, cells, out, named("one")), lambda *_: None))
    assert not open_sweep(plain, cells, out, named("one")).missing()
    with pytest.raises(InputError, match="kit"):
        open_sweep(plain, cells, out, named("two"))


def test_more_than_one_process(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="a sweep runs in one process"):
        open_sweep(plain, grid("dense"), tmp_path / "sweep")


def test_a_method_that_cannot_run_is_refused_before_the_first_run(plain, tmp_path):
    with pytest.raises(InputError, match="adapter is full"):
        open_sweep(replace(plain, adapter="full", rank=None), grid("rst", "gast"), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    deep = replace(plain, layers=(9,))  # only training finds out how many layers there are
    with pytest.raises(InputError, match="9"):
        swept(deep, grid("dense"), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_method_that_is_refused_later_leaves_the_finished_runs(plain, tmp_path, monkeypatch):
    run = lr_sweep._run

    def refused(source, recipe, *more):
        if recipe.method == "rst":
            raise RecipeError("rst cannot train this model")
        return run(source, recipe, *more)

    monkeypatch.setattr(lr_sweep, "_run", refused)
    with pytest.raises(RecipeError, match="rst"):
        swept(plain, grid("dense", "rst", rates=(1e-3,)), tmp_path / "sweep")
    again = open_sweep(plain, grid("dense", "rst", rates=(1e-3,)), tmp_path / "sweep")
    assert [run.cell for run in again.runs()] == [("dense", 1e-3, 0)]
    assert again.missing() == [("rst", 1e-3, 0)]


def test_held_out_rows_that_are_trained_on(plain, rows, tmp_path, caplog):
    open_sweep(plain, grid("dense"), tmp_path / "none")
    assert "training rows too" not in caplog.text
    save_rows(tmp_path / "both.jsonl", count=30)
    open_sweep(replace(plain, eval=str(tmp_path / "both.jsonl")), grid("dense"), tmp_path / "some")
    assert "24 of 30 held-out rows are training rows too" in caplog.text


# --- grids and recipes ---


def test_the_grid_of_a_recipe():
    assert grid_of(Recipe(method="ist", lr=1e-3, seed=4)) == Grid(("ist",), (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), (4,))
    assert grid_of(Recipe(), "dense, ist+gast", "1e-3,5e-4", "1,0") == Grid(("dense", "ist+gast"), (5e-4, 1e-3), (1, 0))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"methods": "dense,gastt"}, "--methods .* did you mean gast?"),
        ({"methods": "dense,dense"}, "--methods"),
        ({"methods": " , "}, "--methods"),
        *(({"rates": rates}, "--rates") for rates in ("1e-3,fast", "0", "-1e-3", "nan", "inf", "1e-3,0.001", "")),
        *(({"seeds": seeds}, "--seeds") for seeds in ("0,x", "4294967296", "-1")),
    ],
)
def test_lists_that_cannot_be_used(lists, message):
    with pytest.raises(RecipeError, match=message):
        grid_of(Recipe(), **lists)


@pytest.mark.parametrize("rate", [2.5e-4, 5e-4, 1e-3, 0.1, 3.0, 1 / 3, 1e-3 / 7, 123.456])
def test_a_rate_reads_back_as_it_was(rate):
    assert float(rate_text(rate)) == rate


def test_each_method_gets_its_own_settings_and_no_others():
    shared = Recipe(
        train="a", eval="b", out="x", target="c", method="gast",
        gast=GASTSettings(support="dataset"), ist=ISTSettings(active=0.5),
    )  # fmt: skip
    made = recipes_of(shared, ("dense", "ist", "gast"))
    assert [one.method for one in made.values()] == ["dense", "ist", "gast"]
    assert made["gast"].gast.support == "dataset"
    assert made["ist"].ist.active == 0.5
    assert {one.out for one in made.values()} == {None}


@pytest.mark.parametrize(
    ("settings", "methods", "message"),
    [
        ({"eval": None}, ("dense",), "--eval FILE"),
        ({"train": ""}, ("dense",), "no training data"),
        ({"resume": True, "out": "x"}, ("dense",), "resume"),
        ({"dp_epsilon": 8.0, "dp_delta": 1e-5}, ("dense",), "dp_epsilon"),
        ({"gast": GASTSettings(select=2)}, ("dense", "ist"), "gast.select is 2, which has no effect with method dense"),
    ],
)
def test_recipes_that_cannot_be_swept(settings, methods, message):
    with pytest.raises(RecipeError, match=message):
        recipes_of(Recipe(**{"train": "a", "eval": "b", "method": "dense", **settings}), methods)


def test_a_target_is_trained_on_by_every_method_and_steers_one(plain, rows, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in arithmetic_rows(3, seed=9)))
    aimed = replace(plain, steps=2, target=str(few), gast=GASTSettings(**{**GASTSettings.with_target, "select": 2}))
    sweep = open_sweep(aimed, grid("dense", "gast", rates=(1e-3,)), tmp_path / "sweep")
    assert [one.target for one in sweep.recipes.values()] == [str(few), str(few)]
    assert len(sweep.read.parts["support"]) == 3
    assert len(sweep.read.parts["train"]) > len(load_rows(str(rows)))
    assert [run.diverged for run in run_missing(sweep, lambda *_: None)] == [None, None]
    again = open_sweep(aimed, grid("dense", "gast", rates=(1e-3,)), tmp_path / "sweep")
    assert again.missing() == []
    with pytest.raises(RecipeError, match=r"target .*also"):
        open_sweep(replace(aimed, target=str(rows)), grid("gast", rates=(1e-3,)), tmp_path / "sweep")
