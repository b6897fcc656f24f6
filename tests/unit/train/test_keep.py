"""`siftune train --keep`: texts of the base or of a file, what it refuses, resuming."""

import json

import pytest
from rich.console import Console
from support.tiny_run import lines, recipe, save_rows
from transformers import AutoTokenizer

from siftune.base.errors import DataError, RecipeError
from siftune.methods.keep import callback
from siftune.recipe.checks import check
from siftune.recipe.read import anchored
from siftune.train.run import train

QUIET = Console(quiet=True)


def trained(base, rows, out, **settings):
    return train(recipe(base, rows, out, **{"method": "dense", **settings}), QUIET)


def test_predictions_of_the_base_are_kept(base, rows, tmp_path):
    settings = {"adapter": "full", "layers": (1, 2)}
    texts = tmp_path / "texts.jsonl"
    save_rows(texts, 4)
    last = []
    for name, keep in (("own", "own"), ("file", str(texts))):
        for weight in (1e-9, 30.0):
            run = tmp_path / f"{name}-{weight:g}"
            trained(base, rows, run, keep=keep, keep_weight=weight, steps=12, **settings)
            last.append([line["keep/kl"] for line in lines(run / "metrics.jsonl") if "keep/kl" in line][-1])
    own_free, own, file_free, file = last
    assert own < 0.8 * own_free
    assert file < 0.8 * file_free


def test_half_of_the_own_texts_follow_prompts_of_training_rows(base, rows, tmp_path, monkeypatch):
    given, sample = [], callback.sample_texts
    monkeypatch.setattr(callback, "sample_texts", lambda *a, **k: given.append(a[4]) or sample(*a, **k))
    trained(base, rows, tmp_path / "run", keep="own", steps=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = {record["prompt"] for record in map(json.loads, rows.read_text(encoding="utf-8").splitlines())}
    assert len(given[0]) == 24  # of all rows, since they are fewer than half of the texts
    assert all(tokenizer.decode(prompt, skip_special_tokens=True) in texts for prompt in given[0])


def test_a_run_does_not_resume_without_its_texts(base, rows, tmp_path):
    settings = {"keep": "own", "steps": 2, "save_every": 1}
    trained(base, rows, tmp_path / "run", **settings)
    with pytest.raises(RecipeError, match="keep"):
        trained(base, rows, tmp_path / "run", resume=True, **{**settings, "steps": 3, "keep": None})


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": "own", "dp_epsilon": 8.0, "dp_delta": 1e-5},
        {"keep": "own", "from_adapter": "run"},
        {"keep_weight": 2.0},
    ],
)
def test_refuses_what_it_does_not_go_with(base, rows, tmp_path, settings):
    with pytest.raises(RecipeError, match="keep"):
        check(recipe(base, rows, tmp_path, **{"method": "dense", **settings}))


def test_file_without_rows_is_named(base, rows, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        trained(base, rows, tmp_path / "run", keep=str(tmp_path / "none.jsonl"))


def test_own_stays_own_beside_a_file_of_this_name(base, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").write_text("")
    assert anchored(recipe(base, rows, tmp_path, method="dense", keep="own")).keep == "own"
