"""Losses of a run's rows: those of the final model, in a file that fits the rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.commands import error_of, siftune
from support.tiny_run import recipe, save_rows

from siftune.base.errors import DataError
from siftune.cli.subjects import find_subject, load_subject
from siftune.data.rows import rows_from
from siftune.data.tokens import Form, tokens_of
from siftune.recipe.read import load_recipe
from siftune.records.rows import used_rows
from siftune.records.visits import NAME
from siftune.suspects.losses import read_losses, score_run, swapped_of, trained_rows
from siftune.train.folder.run import LOSSES
from siftune.train.run import train


@pytest.fixture
def told(request, monkeypatch):
    """Which sources have suspects by the losses alone, where a test says so."""
    if hasattr(request, "param"):
        monkeypatch.setattr("siftune.suspects.losses._told", lambda *_: request.param)


@pytest.fixture
def run(base, tmp_path, told):
    """A run with a target, whose rows come last."""
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "2?", "completion": "4"}\n{"prompt": "3?", "completion": "6"}\n')
    settings = recipe(base, save_rows(tmp_path / "rows.jsonl"), tmp_path / "run", method="dense")
    tuned = train(replace(settings, target=str(few)))
    score_run(tmp_path / "run", tuned.model, tuned.tokenizer)
    return tmp_path / "run"


@pytest.mark.parametrize("told", [{0}, set()], indirect=True)
def test_losses_are_those_of_the_final_model_row_by_row(run):
    model, tokenizer = load_subject(find_subject(str(run)))
    rows = used_rows(run, load_recipe(run / "recipe.yaml"))[:24]  # those of the target are trusted
    losses, made = read_losses(run, trained_rows(run)[1]), swapped_of(rows, seed=0)
    assert losses.row[~losses.decoy].tolist() == losses.row[losses.decoy].tolist() == [*range(24)]

    def loss_of(row):
        encoded = tokens_of([row], Form(tokenizer, 64, "none")).data[0]
        labels = np.array(encoded["labels"][1:])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0, :-1].double()
        own = torch.log_softmax(logits, 1).numpy()[np.arange(len(labels)), np.maximum(labels, 0)]
        return pytest.approx(-own[labels >= 0].sum(), abs=1e-3), (labels >= 0).sum()

    measured = ~np.isnan(losses.elsewhere)
    assert measured.all() or not measured.any()
    for at, number in enumerate(losses.row):
        decoy = losses.decoy[at]
        assert (losses.loss[at], losses.tokens[at]) == loss_of(made[number, "decoy"] if decoy else rows[number])
        if measured[at]:
            assert losses.elsewhere[at] == loss_of(made[number, f"{'decoy' if decoy else 'row'} elsewhere"])[0]


@pytest.mark.parametrize(("least", "count"), [(1, 48), (31, 0)])
def test_other_prompts_are_tried_only_if_the_losses_name_rows(run, monkeypatch, least, count):
    """With one decoy being enough, the losses of a run of six steps name rows."""
    monkeypatch.setattr("siftune.suspects.rule._DECOYS", least)
    score_run(run, *load_subject(find_subject(str(run))))
    assert (~np.isnan(read_losses(run, trained_rows(run)[1]).elsewhere)).sum() == count


def test_rows_of_a_source_that_is_called_target_are_scored(base, tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", 4)
    rows.write_text(rows.read_text().replace("}", ', "source": "target"}'))
    tuned = train(recipe(base, rows, tmp_path / "run", method="dense", steps=1))
    score_run(tmp_path / "run", tuned.model, tuned.tokenizer)
    losses = read_losses(tmp_path / "run", trained_rows(tmp_path / "run")[1])
    assert losses.row[~losses.decoy].tolist() == [0, 1, 2, 3]


def decoys_of(rows, seed):
    return {at: row for (at, what), row in swapped_of(rows, seed).items() if what == "decoy"}


def test_decoys_have_completions_of_other_rows_of_their_source_and_both_another_prompt():
    rows = rows_from([{"prompt": f"{n}?", "completion": str(n % 50), "source": "ab"[n % 2]} for n in range(300)])
    made, decoys = swapped_of(rows, seed=0), decoys_of(rows, seed=0)
    assert len(decoys) == 300
    assert len(made) == 900
    for at, decoy in decoys.items():
        assert decoy.prompt == rows[at].prompt
        assert decoy.completion != rows[at].completion
        assert int(decoy.completion) % 2 == at % 2
        own, other = made[at, "row elsewhere"], made[at, "decoy elsewhere"]
        assert (own.completion, other.completion) == (rows[at].completion, decoy.completion)
        assert own.prompt == other.prompt
        assert own.prompt != rows[at].prompt
        assert int(own.prompt[0].content.removesuffix("?")) % 2 == at % 2
    assert decoys_of(rows, seed=1) != decoys
    assert len(decoys_of(rows_from([{"prompt": f"{n}?", "completion": f"{n}"} for n in range(999)]), 0)) == 200


def test_rows_without_a_prompt_or_another_completion_have_no_decoys():
    assert decoys_of(rows_from([{"text": str(n)} for n in range(100)]), seed=0) == {}
    assert decoys_of(rows_from([{"prompt": str(n), "completion": "yes"} for n in range(100)]), seed=0) == {}
    most = rows_from([{"prompt": str(n), "completion": "no" if n == 7 else "yes"} for n in range(100)])
    assert len(decoys_of(most, seed=0)) == 100
    same = rows_from([{"prompt": "?", "completion": str(n)} for n in range(100)])
    assert len(swapped_of(same, seed=0)) == 100  # no other prompt


def test_the_command_scores_once_and_training_again_removes_the_scores(run, capsys, monkeypatch):
    (run / LOSSES).unlink()
    result, said = siftune(capsys, "rows", run)
    assert (result["rows"], result["suspects"]) == (24, 0)
    assert "too short to tell" in said
    monkeypatch.setattr("siftune.suspects.losses.row_nll", None)  # would be called to score again
    assert siftune(capsys, "rows", run)[0] == result
    train(replace(load_recipe(run / "recipe.yaml"), resume=True, steps=7))
    assert not (run / LOSSES).exists()


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:50]), lambda path: path.unlink()])
def test_a_missing_or_damaged_file(run, spoil):
    (run / LOSSES).write_bytes(b"PAR1")
    spoil(run / LOSSES)
    with pytest.raises(DataError, match=LOSSES):
        read_losses(run, "")


def test_scores_of_other_rows_are_refused(run):
    with pytest.raises(DataError, match="other rows"):
        read_losses(run, "another digest")


def test_a_run_without_a_record_of_its_rows(run, tmp_path, capsys):
    (run / NAME).rename(run / "elsewhere")
    assert "no rows were recorded" in error_of(capsys, "rows", run)
    (run / "elsewhere").rename(run / NAME)
