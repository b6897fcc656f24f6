"""Losses of a run's rows: those of models that were not trained on them, in a file that fits the rows."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from support.commands import error_of, siftune
from support.tiny_run import recipe, save_rows
from support.visited import visits

from siftune.base.errors import DataError, InputError
from siftune.data.rows import rows_from
from siftune.data.tokens import Form, tokens_of
from siftune.recipe.read import load_recipe
from siftune.recipe.training_rows import recipe_of_rows
from siftune.suspects import scoring
from siftune.suspects.decoys import decoys_of
from siftune.suspects.losses import Losses, read_losses, trained_rows, write_losses
from siftune.suspects.scoring import half_of, score_run, tuned_on
from siftune.train.folder.run_folder import HALVES, LOSSES, RunFolder
from siftune.train.run import train
from siftune.train.source import ModelSource

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(scoring, "FEWEST", 2)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run on 40 rows, two of them copies, with a target, whose rows come last; and a copy of it."""
    place = tmp_path_factory.mktemp("finished")
    few, rows = place / "few.jsonl", save_rows(place / "rows.jsonl", 38)
    few.write_text('{"prompt": "2?", "completion": "4"}\n{"prompt": "3?", "completion": "6"}\n')
    rows.write_text(rows.read_text() + "".join(rows.read_text().splitlines(keepends=True)[:2]))
    train(recipe(base, rows, place / "run", method="dense", target=str(few), steps=1), QUIET)
    shutil.copytree(place / "run", place / "copy")
    return place


@pytest.fixture
def run(finished):
    """The folder of that run as it ended; its recipe names it, so that it remains in its place."""
    shutil.rmtree(finished / "run")
    shutil.copytree(finished / "copy", finished / "run")
    return finished / "run"


@pytest.fixture
def trainings(monkeypatch):
    """The models of the two trainings, and the rows of each."""
    runs = []

    def kept(settings, *others):
        with visits() as trained:
            tuned = train(settings, *others)
        places = [visit.place for visit in trained]
        runs.append((tuned, {int(place.rpartition(":")[2]) for place in places if "rows.jsonl" in place}, {*places}))
        return tuned

    monkeypatch.setattr(scoring, "tune", kept)
    return runs


def test_losses_are_those_of_the_model_that_was_not_trained_on_the_row(run, trainings):
    score_run(run, console=QUIET)
    rows, about = trained_rows(run)
    losses = read_losses(run / LOSSES, about, 10**6)
    assert losses.row.tolist() == [*range(40)]  # those of the target are trusted
    assert not (run / HALVES).exists()
    (_, seen, every), (_, others, _) = trainings
    assert (seen | others, seen & others) == ({*range(1, 41)}, set())
    assert {1, 39} <= seen or {1, 39} <= others  # copies
    assert any("few.jsonl" in place for place in every)

    def loss_of(at, prompt, completion):
        tuned = next(tuned for tuned, own, _ in trainings if at + 1 not in own)
        row = replace(rows[completion], prompt=rows[prompt].prompt)
        encoded = tokens_of([row], Form(tuned.tokenizer, 64, "none")).data[0]
        labels = np.array(encoded["labels"][1:])
        with torch.no_grad():
            logits = tuned.model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0, :-1].double()
        own = torch.log_softmax(logits, 1).numpy()[np.arange(len(labels)), np.maximum(labels, 0)]
        return pytest.approx(-own[labels >= 0].sum(), abs=1e-3)

    half = half_of(rows[:40])
    for at, other in enumerate(losses.other):
        assert rows[other].completion != rows[at].completion
        assert half[other] == half[at]
        assert losses.loss[at] == loss_of(at, at, at)
        assert losses.other_loss[at] == loss_of(at, at, other)
    assert np.isfinite([losses.usual, losses.other_usual]).all()


def test_rows_that_cannot_be_scored_leave_nothing_behind(run, monkeypatch):
    def refuse(*_):
        raise DataError("row 3 is too long")

    monkeypatch.setattr(scoring, "losses_of", refuse)
    with pytest.raises(DataError, match="row 3"):
        score_run(run, console=QUIET)
    assert not (run / HALVES).exists()


def test_halves_are_equally_large_and_have_copies_together():
    half = half_of(rows_from([{"prompt": str(n % 91), "completion": "?"} for n in range(101)]))
    assert (half[:10] == half[91:]).all()
    assert half[:91].sum() == 45


def test_answers_that_alternate_in_the_order_of_the_texts_are_in_both_halves():
    rows = rows_from([{"prompt": f"row {n:03}", "completion": "no" if n % 2 else "yes"} for n in range(80)])
    counts = np.bincount(2 * half_of(rows) + np.arange(80) % 2, minlength=4)
    assert counts.min() > 10


def test_earlier_answers_of_a_conversation_are_part_of_the_prompt(run):
    """Losses are those of the last answers, as if earlier ones had no labels."""
    first = {"role": "assistant", "content": "well, well"}
    turns = [{"role": "user", "content": "hi"}, first, {"role": "user", "content": "2?"}]
    tuned = tuned_on(trained_rows(run)[0][:20], recipe_of_rows(run), run / "0", QUIET, ModelSource)
    chat, losses = replace(recipe_of_rows(run), template="chat", max_length=256), []
    for weight in ({}, {"weight": 0}):
        turns[1] = {**first, **weight}
        given = [{"messages": [*turns, {"role": "assistant", "content": text}]} for text in ("4", "22", "no")]
        rows = rows_from(given)
        losses.append(scoring.losses_of(tuned, rows, decoys_of(rows, 0), chat))
    for name in ("tokens", "loss", "other_loss", "usual"):
        np.testing.assert_array_equal(getattr(losses[0], name), getattr(losses[1], name))
    assert losses[0].tokens.tolist() == [2, 3, 3]


@pytest.mark.parametrize(("rows", "target", "steps"), [(20, 0.0, 5), (20, 0.5, 10), (4, 0.0, 2), (400, 0.0, 9)])
def test_a_training_takes_one_pass_over_its_half(run, monkeypatch, tmp_path, rows, target, steps):
    monkeypatch.setattr(scoring, "MOST", 9 if rows == 400 else 300)
    monkeypatch.setattr(scoring, "tune", lambda settings, *_: settings)
    own = replace(recipe_of_rows(run), target_share=target, batch_size=2, accumulate=2, warmup=500)
    every = rows_from([{"prompt": str(n), "completion": "?"} for n in range(rows)])
    settings = tuned_on(every, own, tmp_path / "0", QUIET, ModelSource)
    assert (settings.steps, settings.lr, settings.target) == (steps, 1e-2, own.target)
    assert settings.warmup == load_recipe(run / "recipe.yaml").warmup < 1


def test_rows_that_the_run_left_out_are_in_neither_half(base, tmp_path, trainings):
    rows, drop = save_rows(tmp_path / "rows.jsonl", 60), tmp_path / "drop.txt"
    drop.write_text(f"{rows}:3\n{rows}:4\n")
    rows.write_text(rows.read_text() + json.dumps({"prompt": "no completion"}) + "\n")
    settings = recipe(base, rows, tmp_path / "run", method="dense", drop_rows=str(drop), eval_share=0.2, steps=1)
    with visits() as trained:
        train(replace(settings, bad_rows="drop"), QUIET)
    used = {visit.place for visit in trained}
    score_run(tmp_path / "run", console=QUIET)
    (_, _, one), (_, _, other) = trainings
    every = {row.origin for row in trained_rows(tmp_path / "run")[0]}
    assert one | other == every
    assert used <= every
    assert 30 < len(every) < 58


def test_an_interrupted_training_continues(run, tmp_path, monkeypatch):
    every, folder = trained_rows(run)[0][:20], tmp_path / "0"
    tuned_on(every, recipe_of_rows(run), folder, QUIET, ModelSource)
    ended = json.loads((folder / "run.json").read_text())
    asked = []
    monkeypatch.setattr(scoring, "tune", lambda settings, *_: asked.append(settings.resume))
    for status in ("interrupted", "finished"):
        (folder / "run.json").write_text(json.dumps({**ended, "status": status}))
        tuned_on(every, recipe_of_rows(run), folder, QUIET, ModelSource)
    assert asked == [True, False]
    assert not folder.exists()  # a training that has finished, but whose rows were not scored, begins again


def test_an_interrupted_call_continues(run, trainings, monkeypatch):
    whole = scoring.losses_of

    def interrupted(*arguments):
        if len(trainings) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(scoring, "losses_of", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        score_run(run, console=QUIET)
    assert stop.value.__notes__ == ["the same command continues"]
    assert (run / HALVES / "0.parquet").is_file()
    monkeypatch.setattr(scoring, "losses_of", whole)
    score_run(run, console=QUIET)
    assert len(trainings) == 3  # of the second half again
    resumed = read_losses(run / LOSSES, trained_rows(run)[1], 10**6)
    score_run(run, console=QUIET)
    again = read_losses(run / LOSSES, trained_rows(run)[1], 10**6)
    assert np.array_equal(resumed.loss, again.loss)


def test_the_command_scores_once_and_training_again_removes_the_scores(run, capsys, monkeypatch):
    result, said = siftune(capsys, "rows", run)
    assert (result["rows"], "No row is suspect" in said or result["suspects"] > 0) == (40, True)
    monkeypatch.setattr(scoring, "tune", None)  # would be called to score again
    assert siftune(capsys, "rows", run)[0] == result
    (run / HALVES).mkdir()
    train(replace(load_recipe(run / "recipe.yaml"), resume=True, steps=2), QUIET)
    assert not (run / LOSSES).exists()
    assert not (run / HALVES).exists()


def test_the_base_may_have_moved(run, base, tmp_path, capsys, trainings):
    moved = shutil.copytree(base, tmp_path / "moved")
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace(str(base), "/elsewhere/base"))
    assert "/elsewhere/base" in error_of(capsys, "rows", run)
    assert siftune(capsys, "rows", run, "--base", moved)[0]["rows"] == 40
    assert len(trainings) == 2


def test_too_few_rows_are_refused_before_a_training(base, tmp_path, capsys, monkeypatch):
    rows = save_rows(tmp_path / "rows.jsonl", 24)
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=1), QUIET)
    monkeypatch.setattr(scoring, "tune", None)
    said = error_of(capsys, "rows", tmp_path / "run")
    assert "only 24 rows of" in said
    assert "30 are needed" in said


def test_a_run_of_another_method_is_scored_with_it(base, tmp_path, trainings):
    rows = save_rows(tmp_path / "rows.jsonl", 40)
    train(
        recipe(base, rows, tmp_path / "run", method="gast", adapter="full", rank=None, layers=(0,), lr=1e-3, steps=1),
        QUIET,
    )
    score_run(tmp_path / "run", console=QUIET)
    assert len(trainings) == 2
    assert np.isfinite(read_losses(tmp_path / "run" / LOSSES, trained_rows(tmp_path / "run")[1], 10**6).loss).all()


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:50]), lambda path: path.unlink()])
def test_a_missing_or_damaged_file(tmp_path, spoil):
    (tmp_path / LOSSES).write_bytes(b"PAR1")
    spoil(tmp_path / LOSSES)
    with pytest.raises(InputError, match=LOSSES):
        read_losses(tmp_path / LOSSES, "", 1)


def test_scores_of_other_rows_are_refused(tmp_path):
    kinds = {"row": np.int32, "tokens": np.int32, "other": np.int32, "covered": bool}
    losses = Losses(**{name: np.zeros(1, kinds.get(name, np.float32)) for name in Losses.__annotations__})
    write_losses(tmp_path / LOSSES, losses, "a digest")
    assert read_losses(tmp_path / LOSSES, "a digest", 10**6).row.tolist() == [0]
    with pytest.raises(DataError, match="other rows"):
        read_losses(tmp_path / LOSSES, "another digest", 10**6)


def test_a_run_that_has_not_ended_or_is_private(run, capsys):
    RunFolder(run).write_run(status="finished", rows=None)
    assert "no hash of its training rows" in error_of(capsys, "rows", run)
    (run / "run.json").unlink()
    assert "run.json" in error_of(capsys, "rows", run)
