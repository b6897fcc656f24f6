"""`siftune sift`, and `siftune train --sift`, which sifts before it trains."""

import inspect
import json
import os
import re
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.commands import error_of, siftune
from support.tiny_kit import save_kit
from support.trainers import At

from siftune import sift
from siftune.base.errors import TrainingError
from siftune.base.settings import described, help_of, types_of
from siftune.cli.main import main
from siftune.cli.options import parse
from siftune.cli.sift import Options, _next
from siftune.cli.train import Options as Train
from siftune.data.decisions import read_decisions
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import SCORING, Recipe, resolve_recipe
from siftune.recipe.training_rows import read_rows
from siftune.sifting import scoring, tuning
from siftune.sifting import sift as module
from siftune.sifting.choose import Choice
from siftune.sifting.sift import Sifted

QUIET = Console(quiet=True)
SETTINGS = "{template: none, max_length: 64, rank: 2, batch_size: 4, lr: 0.01, log_every: 9}"


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Have a sifting before training take three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 3)
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a pool, a target and settings."""
    place = tmp_path_factory.mktemp("task")
    sums = [{"prompt": f"{i}+{i}?", "completion": str(i + i)} for i in range(24)]
    save(place / "few.jsonl", sums[:12])
    hello = [{"prompt": f"say {i}", "completion": "hello " * 3, "source": "words"} for i in range(24)]
    save(place / "pool.jsonl", [*hello, *({**row, "source": "sums"} for row in sums[12:])])
    (place / "recipe.yaml").write_text(SETTINGS)
    return place


@pytest.fixture(scope="module")
def words(base, task):
    """A command that trains two steps on the complete pool."""
    given = ["--model", base, "--train", task / "pool.jsonl", "--target", task / "few.jsonl", "--steps", "2"]
    return ["train", task / "recipe.yaml", *given]


@pytest.fixture(scope="module")
def sifted(words, tmp_path_factory):
    """A run of `train --sift`."""
    run = tmp_path_factory.mktemp("sifted") / "run"
    assert main([*map(str, words), "--out", str(run), "--sift"]) == 0
    return run


@pytest.fixture
def out(sifted, tmp_path):
    """A run folder in which sifting was done and nothing else."""
    shutil.copytree(sifted / "sift", tmp_path / "run" / "sift")
    return tmp_path / "run"


@pytest.fixture
def first_training(capsys, monkeypatch):
    """The recipe of the first training of a command, which ends there."""

    def of(*words):
        def fail(recipe, *_):
            seen.append(recipe)
            raise TrainingError("It ends here.")

        seen = []
        monkeypatch.setattr(tuning, "tune", fail)
        assert "It ends here" in error_of(capsys, *words)
        return resolve_recipe(seen[0])

    return of


def rows_of(run):
    """Rows of a run: those of the pool, and those of the target."""
    rows = read_rows(load_recipe(run / "recipe.yaml")).parts["train"]
    return [[row.origin for row in rows if name in row.origin] for name in ("pool", "few")]


def test_the_rows_of_the_run_are_the_selected_ones_and_the_target(sifted, task, tmp_path, monkeypatch):
    selected = len((sifted / "sift" / "sifted.jsonl").read_text().splitlines())
    pool, few = rows_of(sifted)
    assert 0 < len(pool) == selected < 36
    assert len(set(few)) == 12
    recipe = load_recipe(sifted / "recipe.yaml")
    assert recipe.drop_rows == str(sifted / "sift" / "dropped.csv")
    assert not set(pool) & {*read_decisions(recipe.drop_rows).selected}
    tuning = load_recipe(sifted / "sift" / "tuning" / "recipe.yaml")
    assert (tuning.steps, tuning.rank, tuning.lr, tuning.template) == (3, 2, 0.01, "none")


def test_the_run_continues_with_the_adapter_of_the_sifting(words, sifted, out, capsys):
    """A single step of warm-up has a learning rate of 0."""
    assert load_recipe(sifted / "recipe.yaml").from_adapter == str(sifted / "sift" / "tuning")
    _, said = siftune(capsys, *words[:-1], "1", "--warmup", "1", "--out", out, "--sift")
    assert f"the training continues with the adapter in {out}/sift/tuning" in said
    tuned, trained = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (out / "sift/tuning", out))
    assert any(tensor.any() for name, tensor in tuned.items() if "lora_B" in name)
    assert all(torch.equal(trained[name], tensor) for name, tensor in tuned.items())
    assert trained.keys() == tuned.keys()


@pytest.mark.parametrize(
    ("settings", "continues"),
    [
        ({}, True), ({"method": "ist"}, True), ({"targets": ("q_proj",), "layers": (0,)}, True),
        ({"keep": "own"}, False), ({"dropout": 0.1}, False), ({"adapter": "dora"}, False),
        ({"from_adapter": "own"}, False),
    ],
)  # fmt: skip
def test_which_runs_continue(base, task, sifted, tmp_path, monkeypatch, settings, continues):
    """The folder of the sifting is that of another run: of a sifting only what follows it counts here."""
    done = Sifted(sifted / "sift", [0], ["pool.jsonl:1"], *[None] * 5, {}, {}, "", [], 1.0)
    monkeypatch.setattr(module, "sift_pool", lambda *_: done)
    monkeypatch.setattr(module, "find_checkpoint", None)
    own = {"train": str(task / "pool.jsonl"), "target": str(task / "few.jsonl"), "out": str(tmp_path / "run")}
    recipe, _, _ = module.sift_first(Recipe(model=str(base), template="none", **own, **settings), None, QUIET)
    if continues:
        assert recipe.from_adapter == str(sifted / "sift" / "tuning")
        assert (recipe.targets, recipe.layers, recipe.rank) == (None, None, None)
    else:
        assert recipe.from_adapter == settings.get("from_adapter")
    check(recipe)


@pytest.mark.parametrize("gone", ["sift/tuning", "sift/tuning/adapter", None])
def test_an_adapter_of_a_sifting_that_has_changed_or_is_gone_is_refused(words, out, capsys, gone):
    path = out / "sift" / "tuning" / "adapter" / "adapter_model.safetensors"
    if gone is None:
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    else:
        shutil.rmtree(out / gone)
    said = error_of(capsys, *words, "--out", out, "--sift")
    assert said.startswith(f"{path.parent} is not what was trained")
    assert f"remove {out / 'sift'}" in said


def test_a_run_resumes_without_sifting_in_another_folder(sifted, tmp_path, monkeypatch):
    shutil.copytree(sifted, tmp_path / "run")
    monkeypatch.setattr(module, "sift_pool", None)
    monkeypatch.chdir("/")
    for more in ([], ["--sift"]):
        assert main(["train", "--resume", str(tmp_path / "run"), "--steps", str(3 + len(more)), *more]) == 0
    assert rows_of(tmp_path / "run") == rows_of(sifted)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_interrupted_while_sifting(words, sifted, tmp_path, interfere, monkeypatch, capsys, resume):
    run = tmp_path / "run"
    interfere(At("on_step_begin", 1, lambda _: os.kill(os.getpid(), signal.SIGINT)))
    assert main([*map(str, words), "--out", str(run), "--sift"]) == 130
    continues = f"the same command with --out {run} continues"
    assert capsys.readouterr().err.splitlines()[-1] == f"siftune: interrupted; {continues}"
    assert [path.name for path in run.iterdir()] == ["sift"]
    monkeypatch.undo()
    assert main([*map(str, words), "--out", str(run), "--sift", *resume]) == 0
    assert rows_of(run) == rows_of(sifted)
    assert (run / "sift" / "losses.jsonl").read_bytes() == (sifted / "sift" / "losses.jsonl").read_bytes()


def test_a_pool_that_is_selected_in_full(words, out, capsys):
    _, said = siftune(capsys, *words, "--out", out, "--sift", "36")
    assert load_recipe(out / "recipe.yaml").drop_rows is None
    assert "selected 36 of 36 rows of the pool (100%)" in said
    assert "selected by source: 100% of words, 100% of sums\n" in said


@pytest.mark.parametrize(
    ("method", "adapter", "rate"),
    [("gast", "lora", 0.01), ("ist", "series", 5e-4), ("ist", "full", 5e-4), ("dense", "ia3", 5e-4)],
)
def test_methods_and_adapters(words, tmp_path, first_training, method, adapter, rate):
    """Rows are scored with LoRA and dense training, and its rate if the run has another method or adapter."""
    rank = ["--rank", "None"] if adapter in ("full", "ia3") else []
    more = ["--sift", "--method", method, "--adapter", adapter, *rank, "--out", tmp_path / "run"]
    scoring = first_training(*words, *more)
    assert (scoring.method, scoring.adapter, scoring.lr, scoring.layers) == ("dense", "lora", rate, None)
    assert scoring.rank == (2 if adapter == "lora" else 32)


def test_a_kit(words, tmp_path):
    kit = save_kit(tmp_path / "kit")
    run = tmp_path / "run"
    assert main([*map(str, words), "--model", str(kit.path), "--out", str(run), "--sift"]) == 0
    assert (run / "return").exists()
    assert load_recipe(run / "sift" / "tuning" / "recipe.yaml").layers == (0, 1, 3)
    assert json.loads((run / "sift" / "sift.json").read_text())["facts"]["kit"] == kit.digest


def test_a_dry_run_does_not_sift(words, tmp_path, capsys):
    _, said = siftune(capsys, *words, "--out", tmp_path / "run", "--sift", "--dry-run")
    assert "a dry run does not sift" in said
    assert not (tmp_path / "run").exists()
    assert "--target" in error_of(capsys, *words[:-4], "--steps", "2", "--sift", "--dry-run")


def test_a_folder_with_a_run_is_refused_before_sifting(words, sifted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "sift_pool", None)
    shutil.copytree(sifted, tmp_path / "run")
    assert "holds a run already" in error_of(capsys, *words, "--out", tmp_path / "run", "--sift")


def test_a_training_that_fails_leaves_nothing(words, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise TrainingError("Broken. So far, more.") from TrainingError("Broken.")

    monkeypatch.setattr(tuning, "tune", fail)
    said = error_of(capsys, *words, "--out", tmp_path / "run", "--sift")
    assert said == "training on 6 rows of the target: Broken."
    assert not (tmp_path / "run").exists()


# --- bad rows ---


@pytest.fixture
def bad(tmp_path):
    """A file of rows like the words of the pool."""
    return save(tmp_path / "bad.jsonl", [{"prompt": f"say {i}", "completion": "hello " * 3} for i in range(30, 42)])


def test_rows_like_bad_ones_are_left_out_of_the_run_and_the_target_does_not_sift(words, bad, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "unlike", lambda scores, _: Choice(scores > np.sort(scores)[9], "ten are left out"))
    run = tmp_path / "run"
    assert main([*map(str, words), "--out", str(run), "--avoid", str(bad)]) == 0
    pool, few = rows_of(run)
    assert (len(pool), len(set(few))) == (26, 12)
    assert {path.name for path in (run / "sift").iterdir()} >= {"avoid", "dropped.csv"}
    assert not (run / "sift" / "tuning").exists()


# --- siftune sift ---


# a value of each setting of a recipe that `siftune sift` takes, other than the default
GIVEN = {
    "model": ["base"], "train": ["a pool.jsonl", "b.jsonl"], "target": ["few.jsonl"], "limit": ["9"],
    "dtype": ["float32"], "quantize": ["4bit"], "attention": ["eager"], "columns": ["prompt=q", "completion=a"],
    "template": ["chat.jinja"], "max_length": ["64"], "completion_only": None, "bad_rows": ["drop"], "rank": ["2"],
    "alpha": ["3"], "targets": ["q_proj", "v_proj"], "layers": ["0", "-1"], "lr": ["1e-05"], "batch_size": ["4"],
    "accumulate": ["5"], "checkpointing": None, "seed": ["6"], "deterministic": None,
}  # fmt: skip
OWN = {"avoid", "share", "max_score", "min_similarity", "steps", "out"}


def flags(name):
    """A setting as flag and value, or as a switch."""
    key = name.replace("_", "-")
    if GIVEN[name] is None:
        return [f"--no-{key}" if getattr(Recipe, name) else f"--{key}"]
    return [f"--{key}", *GIVEN[name]]


def test_the_command_takes_the_settings_of_the_trainings_that_score():
    assert {*types_of(Options)} == {*SCORING, "train", "target", "limit", *OWN}
    assert {*GIVEN} == {*types_of(Options)} - OWN


def test_settings_of_a_recipe_have_its_type_and_default():
    types, lines = types_of(Options), help_of(Options)
    for name in {*types} & {*types_of(Recipe)} - {"steps"}:
        assert described(types[name]) == described(types_of(Recipe)[name]), name
        assert getattr(Options, name) == getattr(Recipe, name), name
    assert lines["rank"] == help_of(Recipe)["rank"]
    assert lines["train"].startswith("The pool: ")
    assert Options.steps == inspect.signature(sift).parameters["steps"].default


def test_the_training_that_follows_has_all_settings_that_scored():
    """One setting is given in each case, then all, none with its default. An adapter to continue with has its shape."""
    sifted, tuned = (SimpleNamespace(dropped=None, adapter=path) for path in (None, Path("s/tuning/adapter")))
    for names in [*([name] for name in GIVEN), [*GIVEN]]:
        given = [word for name in names for word in flags(name)]
        options = parse(Options, [*given, "--steps", "7", "--share", "0.5", "--out", "here"], "siftune sift")
        program, command, *words = shlex.split(_next(options, sifted))
        assert (program, command) == ("siftune", "train")
        train = parse(Train, words, "siftune train")
        for name in names:
            assert getattr(train, name) == getattr(options, name) != getattr(Recipe, name), name
        assert (train.steps, train.sift, train.out, train.from_adapter) == (None, False, None, None)
        further = parse(Train, shlex.split(_next(options, tuned))[2:], "siftune train")
        shape = {name: getattr(Recipe, name) for name in ("rank", "alpha", "targets", "layers")}
        assert further == replace(train, **shape, from_adapter="s/tuning")


def test_the_trainings_that_score_have_the_settings_of_the_command(base, task, tmp_path, first_training):
    named = ["--model", base, "--train", task / "pool.jsonl", "--target", task / "few.jsonl", "--out", tmp_path / "s"]
    more = ["--template", "none", "--attention", "eager", "--no-completion-only", "--rank", "2", "--alpha", "3"]
    more += ["--targets", "q_proj", "--layers", "-1", "--batch-size", "2", "--accumulate", "2", "--checkpointing"]
    recipe = first_training("sift", *named, *more, "--share", "5")
    assert (recipe.attention, recipe.completion_only, recipe.rank, recipe.alpha) == ("eager", False, 2, 3)
    assert (recipe.targets, recipe.layers, recipe.accumulate) == (("q_proj",), (-1,), 2)
    assert recipe.checkpointing


def test_the_command_names_the_training_that_follows(base, task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(task / "pool.jsonl", "first.jsonl")
    Path("second pool.jsonl").write_text("".join(reversed((task / "pool.jsonl").read_text().splitlines(True))))
    pool = ["--train", "first.jsonl", "second pool.jsonl", "--limit", "12", "--target", task / "few.jsonl"]
    settings = ["--model", base, "--template", "none", "--max-length", "64", "--batch-size", "4", "--rank", "2"]
    again = []
    for share in ("0.5", "24"):
        result, said = siftune(capsys, "sift", *pool, *settings, "--steps", "2", "--share", share, *again)
        (folder,) = (tmp_path / "runs").iterdir()
        assert folder.name.endswith("-sift")
        assert Path(result["folder"]).resolve() == folder
        assert (result["pool"], len((folder / "sifted.jsonl").read_text().splitlines())) == (24, result["selected"])
        assert (result["dropped"] is None) == (share == "24")
        command = re.search(r"next: `siftune (.*)`", said)
        assert command is not None, said
        train = [*shlex.split(command[1]), "--steps", "1", "--batch-size", "4", "--out", f"run {share}"]
        assert main(train) == 0
        assert load_recipe(f"run {share}/recipe.yaml").from_adapter == str(folder / "tuning")
        rows = read_rows(load_recipe(f"run {share}/recipe.yaml")).parts["train"]
        assert sum("few" not in row.origin for row in rows) == result["selected"]
        again = ["--out", folder]
