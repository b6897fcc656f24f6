"""Rows like bad ones, left out: a slow oracle, target and bad rows together, interruption, and wrong input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune import sift
from siftune.base.errors import DataError, InputError, RecipeError
from siftune.recipe.schema import Recipe
from siftune.sifting import scoring, tuning
from siftune.sifting.choose import Choice, unlike
from siftune.train.run import train

from .conftest import write
from .test_sift import QUIET, excluded, loss, records, table


@pytest.fixture
def bad(tmp_path):
    """A file of bad rows, like the words of the pool."""
    return write(tmp_path / "bad.jsonl", [{"prompt": f"say {i}", "completion": "hello " * 3} for i in range(30, 42)])


@pytest.fixture
def avoiding(given, bad):
    """Arguments of `sift` with bad rows alone."""
    return {**given, "target": None, "avoid": bad}


def test_scores_and_rows_that_remain_are_those_of_a_slow_oracle(avoiding, base, bad, tmp_path, task, monkeypatch):
    monkeypatch.setattr(tuning, "_FURTHER", 2)
    sifted = sift(**avoiding, console=QUIET)
    place = sifted.folder / "avoid"
    seen = records(place / "seen.jsonl")
    assert len(seen) == 6
    usual = {name: value for name, value in avoiding.items() if name not in ("target", "avoid", "train")}
    pool = train(Recipe(**{**usual, "train": str(avoiding["train"]), "out": str(tmp_path / "pool")}), QUIET).folder
    further = {
        "train": str(place / "seen.jsonl"),
        "steps": 2,
        "rank": None,
        "out": str(tmp_path / "bad"),
        "from_adapter": str(pool.path),
    }
    tuned = train(Recipe(**{**usual, **further}), QUIET).folder
    tokenizer, both = AutoTokenizer.from_pretrained(base), []
    for adapter in (tuned.adapter, pool.adapter):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        both.append([loss(model, tokenizer, row) for row in (*task.pool, *records(bad))])
    change = np.subtract(*both)
    assert np.abs(change).max() > 0.01
    np.testing.assert_allclose(sifted.bad_scores, change[:36], atol=2e-5)
    assert sifted.scores is None
    found = table(place)
    np.testing.assert_allclose([float(line["loss_before"]) for line in found], both[1][:36], atol=2e-5)
    held_out = change[36:][[row not in seen for row in records(bad)]]
    chosen = unlike(change[:36], held_out).rows_R.nonzero()[0].tolist()
    assert sifted.selected == chosen == [n for n, line in enumerate(found) if line["selected"] == "yes"]
    assert records(sifted.rows) == [task.pool[n] for n in chosen]


def least_similarity(folder):
    return np.sort(json.loads((folder / "similar.jsonl").read_text())["target"])[1].round(5)


def test_rows_like_the_target_and_unlike_the_bad_rows_are_selected(given, bad, monkeypatch):
    monkeypatch.setattr(scoring, "unlike", lambda scores, _: Choice(scores > np.sort(scores)[9], "ten are left out"))
    sifted = sift(**given, avoid=bad, share=20, console=QUIET)
    task = sifted.similar >= least_similarity(sifted.folder)
    likely = np.lexsort((np.where(task, sifted.scores, -sifted.similar), ~task))[:20]
    remaining = np.argsort(sifted.bad_scores, kind="stable")[10:]
    assert sifted.selected == np.intersect1d(likely, remaining).tolist()
    assert 10 <= len(sifted.selected) < 20
    assert len(excluded(sifted.dropped)) == 36 - len(sifted.selected)
    selected = [number for number, line in enumerate(table(sifted.folder)) if line["selected"] == "yes"]
    assert selected == sifted.selected
    assert "ten are left out" in sifted.reason


def test_no_row_remains(given, bad, monkeypatch):
    monkeypatch.setattr(scoring, "unlike", lambda scores, _: Choice(np.zeros(len(scores), bool), ""))
    with pytest.raises(DataError, match="bad rows"):
        sift(**given, avoid=bad, share=20, console=QUIET)


def test_bad_rows_in_the_pool_are_left_out_of_it_and_of_the_training_on_it(avoiding, bad, task, monkeypatch):
    trained, tune = [], tuning.tune
    monkeypatch.setattr(tuning, "tune", lambda *given: trained.append(given[3]) or tune(*given))
    own = records(bad)[3]
    write(avoiding["train"], [own, *task.pool, own])
    sifted = sift(**avoiding, console=QUIET)
    assert len(sifted.places) == 36
    assert sifted.notes[0].startswith("2 rows of the pool are in the bad rows")
    gone = [f"{avoiding['train']}:{number}" for number in (1, 38)]
    assert set(gone) <= excluded(sifted.dropped)
    assert set(gone) <= excluded(sifted.folder / "avoid" / "scores.csv")  # no list brings them back
    assert [line["score"] for line in table(sifted.folder / "avoid")[36:]] == ["", ""]
    assert [row.origin for row in trained[0].parts["train"]] == sifted.places


def test_scores_by_the_target_are_used_again_if_bad_rows_are_added(given, complete, bad, monkeypatch):
    before = (complete / "losses.jsonl").read_bytes()
    shutil.rmtree(complete / "tuning")
    sift(**given, avoid=bad, share=20, console=QUIET)
    assert (complete / "losses.jsonl").read_bytes() == before
    assert not (complete / "tuning").exists()
    write(bad, records(bad)[1:])
    with pytest.raises(RecipeError, match="bad rows"):
        sift(**given, avoid=bad, console=QUIET)


@pytest.mark.parametrize(
    "changes", [{"avoid": "few rows"}, {"avoid": "pool"}, {"avoid": "both"}, {"share": 0.5}, {"avoid": None}]
)
def test_wrong_input_is_one_sentence_before_the_model_is_loaded(given, bad, tmp_path, task, monkeypatch, changes):
    monkeypatch.setattr("siftune.train.source.load_model", None)
    few = write(tmp_path / "7.jsonl", [*records(bad)[:7], *records(bad)[:3]])
    both = write(tmp_path / "both.jsonl", [*records(bad), task.target[0]])
    files = {"few rows": few, "pool": given["train"], "both": both}
    settings = {**given, "avoid": bad, **{name: files.get(value, value) for name, value in changes.items()}}
    if changes != {"avoid": "both"}:
        settings["target"] = None
    with pytest.raises(InputError) as refused:
        sift(**settings, console=QUIET)
    assert "\n" not in str(refused.value)
    assert not Path(given["out"]).exists()
