"""Limits that replace those of the target's own rows, and training by the files of a sifted pool."""

import json
from pathlib import Path

import numpy as np
import pytest

from siftune import sift
from siftune.base.errors import DataError, RecipeError
from siftune.data.decisions import read_decisions
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import read_rows
from siftune.suspects import answers

from .conftest import write
from .test_sift import QUIET, records, table


def within(folder, max_score, min_similarity):
    """Numbers of the rows within limits, by the numbers in the file."""
    return [
        number
        for number, line in enumerate(table(folder))
        if line["score"] and float(line["score"]) <= max_score and float(line["similarity"]) >= min_similarity
    ]


def state(folder):
    return json.loads((Path(folder) / "sift.json").read_text())["state"]


@pytest.fixture
def no_model(monkeypatch):
    """Have nothing loaded."""
    monkeypatch.setattr("siftune.train.source.load_model", None)


def test_other_limits_select_again_without_a_model(given, complete, no_model):
    first = sift(**given, console=QUIET)
    scores = np.sort(first.scores[np.isfinite(first.scores)])
    for limit in (scores[3], float(scores[5]), 99):  # of rows, which are within their own score
        sifted = sift(**given, max_score=limit, console=QUIET)
        assert sifted.selected == within(complete, limit, first.similarity_limit)
        assert (sifted.score_limit, sifted.similarity_limit) == (limit, first.similarity_limit)
        assert state(complete)["score_limit"] == limit
        assert records(sifted.rows) == [records(given["train"])[number] for number in sifted.selected]
    stricter = float(np.sort(first.similar[first.similar >= first.similarity_limit])[2])
    sifted = sift(**given, max_score=99, min_similarity=stricter, console=QUIET)
    assert sifted.selected == within(complete, 99, stricter)
    assert 0 < len(sifted.selected) < np.isfinite(first.scores).sum()
    assert sift(**given, console=QUIET).selected == first.selected


def test_the_limits_of_the_target_select_the_same_rows_if_they_are_given(given, complete, no_model, monkeypatch):
    monkeypatch.setattr("siftune.sifting.choose._SEPARATION", 0.0)
    monkeypatch.setattr("siftune.sifting.choose._WRONG", 0.0)
    first = sift(**given, console=QUIET)
    task = first.similar >= first.similarity_limit
    assert (first.scores[task] <= first.score_limit).sum() == len(first.selected) > 0
    assert {state(complete)[name] for name in ("score_limit", "similarity_limit")} == {
        first.score_limit,
        first.similarity_limit,
    }
    again = sift(**given, max_score=first.score_limit, min_similarity=first.similarity_limit, console=QUIET)
    assert again.selected == first.selected


def test_a_list_that_was_edited_is_kept_when_rows_are_selected_again(given, complete, no_model, caplog):
    sift(**given, console=QUIET)
    sift(**given, max_score=99, console=QUIET)
    assert not [*complete.glob("*edited*")]
    for number in ("", "1"):
        edited = (complete / "scores.csv").read_text().replace("yes", "no")
        (complete / "scores.csv").write_text(edited)
        sift(**given, console=QUIET)
        kept = complete / f"scores.edited{number}.csv"
        assert kept.read_text() == edited
        told = f"{complete / 'scores.csv'} was edited, or written by another command: it is now {kept}"
        assert told in caplog.messages
        assert "yes" in (complete / "scores.csv").read_text()


def test_without_a_limit_none_is_recorded(given, complete, no_model):
    sift(**given, max_score=99, console=QUIET)
    sifted = sift(**given, share=5, console=QUIET)
    assert sifted.score_limit is sifted.similarity_limit is None
    assert state(complete)["score_limit"] is state(complete)["similarity_limit"] is None


def test_rows_that_a_lower_similarity_brings_are_scored_alone(given, complete, monkeypatch):
    counts = []
    original = answers.row_nll
    monkeypatch.setattr(answers, "row_nll", lambda m, rows, *a: counts.append(len(rows)) or original(m, rows, *a))
    before = np.isfinite(sift(**given, share=5, console=QUIET).scores)
    assert counts == []
    wider = sift(**given, max_score=99, min_similarity=-1, console=QUIET)
    assert wider.selected == [*range(36)]
    assert sum(counts) == 2 * (~before).sum()  # in two trainings
    counts.clear()
    fresh = sift(**{**given, "out": given["out"] + " fresh"}, max_score=99, min_similarity=-1, console=QUIET)
    np.testing.assert_allclose(wider.scores, fresh.scores, atol=2e-5)
    counts.clear()
    monkeypatch.setattr("siftune.train.source.load_model", None)
    assert np.isfinite(sift(**given, share=5, console=QUIET).scores).tolist() == before.tolist()
    assert sift(**given, max_score=99, min_similarity=-1, console=QUIET).selected == [*range(36)]


def write_nearly_equal_prompts(given, others):
    """40 rows with the form of the target's prompts, and other ones; the target's prompts are nearly equal."""
    colours = ("red", "blue", "green")
    for name, numbers in (("train", range(40)), ("target", range(1000, 1012))):
        rows = [{"prompt": f"color {colours[n % 3]} item {n} ?", "completion": colours[n % 3]} for n in numbers]
        write(given[name], [*rows, *(others if name == "train" else [])])


@pytest.mark.usefixtures("shared_answers")
@pytest.mark.parametrize("first", [{"share": 10}, {"min_similarity": 0.95}])
def test_a_limit_selects_the_same_rows_after_another_although_none_is_of_the_task(given, task, first, monkeypatch):
    monkeypatch.setattr("siftune.sifting.similarity._BELOW", 1)  # no gap widens the task
    write_nearly_equal_prompts(given, task.pool[:10])
    with pytest.raises(DataError, match="no prompt of the pool"):
        sift(**given, console=QUIET)
    fresh = sift(**{**given, "out": given["out"] + " fresh"}, min_similarity=0.9, console=QUIET)
    assert 12 < np.isfinite(fresh.scores).sum() < 50
    sift(**given, **first, console=QUIET)
    again = sift(**given, min_similarity=0.9, console=QUIET)
    np.testing.assert_allclose(again.scores, fresh.scores, atol=2e-5)
    assert again.selected == fresh.selected


def test_other_tasks_behind_a_gap_widen_the_task(given, task):
    write_nearly_equal_prompts(given, task.pool[:10])
    sifted = sift(**given, console=QUIET)
    assert np.isfinite(sifted.scores).tolist() == [True] * 40 + [False] * 10
    assert sifted.similarity_limit == sifted.similar[:40].min()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_score": 1.0, "share": 0.5}, "leave out share, or the limits"),
        ({"min_similarity": 0.5, "share": 5}, "leave out share, or the limits"),
        ({"max_score": 1.0, "target": None, "avoid": "few.jsonl"}, "--target FILE"),
        ({"max_score": float("-inf")}, "max_score is -inf"),
        ({"max_score": float("nan")}, "max_score is nan"),
        ({"max_score": float("inf")}, "max_score is inf"),
        ({"max_score": True}, "max_score is True"),
        ({"min_similarity": 1.5}, "min_similarity is 1.5"),
        ({"min_similarity": "0.5"}, "min_similarity is '0.5'"),
    ],
)
def test_wrong_limits_are_refused_before_anything_is_read(given, tmp_path, no_model, changes, message):
    with pytest.raises(RecipeError, match=message):
        sift(**{**given, **changes}, console=QUIET)
    assert not Path(given["out"]).exists()


def test_limits_without_a_row_name_the_nearest_value(given, complete, no_model):
    sifted = sift(**given, max_score=99, console=QUIET)
    lowest, highest = np.nanmin(sifted.scores), sifted.similar.max()
    with pytest.raises(DataError, match=rf"the lowest score is {lowest}, the limit 0\.0; .*higher max_score"):
        sift(**given, max_score=0, console=QUIET)
    with pytest.raises(DataError, match=rf"highest similarity is {highest}, the limit 1\.0; .*lower min_similarity"):
        sift(**given, min_similarity=1, console=QUIET)


def test_a_sifted_pool_is_shown_on_one_line(given, complete, no_model):
    sifted = sift(**given, share=5, console=QUIET)
    expected = f"Sifted(folder={str(complete)!r}, selected=5 of 36 rows, reason='those with the lowest scores, "
    assert repr(sifted) == f"{expected}as many as asked for')"


# --- training by the files ---


def trained(given, file, **more):
    """Places of the training rows of a recipe, as they are in the pool."""
    recipe = Recipe(train=str(given["train"]), drop_rows=str(file), **more)
    return [row.origin for row in read_rows(recipe).parts["train"]]


def test_either_file_leaves_out_the_same_rows_in_any_folder(given, complete, tmp_path, no_model, monkeypatch):
    """`given` names the pool relative to a folder that the training does not begin in."""
    monkeypatch.chdir(tmp_path)
    relative = {**given, "train": "pool.jsonl", "target": "few.jsonl", "out": "sifted"}
    sifted = sift(**relative, share=9, console=QUIET)
    monkeypatch.chdir("/")
    expected = [f"{given['train']}:{number + 1}" for number in sifted.selected]
    assert len(expected) == 9
    scores, dropped = complete / "scores.csv", complete / "dropped.csv"
    assert trained(given, scores) == trained(given, dropped) == expected
    columns = ["place", "selected", "score", "similarity", "source", "prompt", "completion"]
    for path in (scores, dropped):
        assert path.read_text().splitlines()[0].split(",") == columns
    moved = tmp_path / "moved.csv"  # as a reviewer changes it
    changed = [*scores.read_text().splitlines(True)]
    at = next(at for at, line in enumerate(changed) if ",no," in line)
    changed[at] = changed[at].replace(",no,", ",TRUE,")
    moved.write_text("".join(changed))
    assert sorted(trained(given, moved)) == sorted([*expected, f"{given['train']}:{at}"])


def test_copies_follow_in_scores_and_are_left_out_by_dropped(given, complete, no_model, task):
    """A selected row, one that is left out, and a target row each have copies in the pool."""
    pool = [task.target[0], *task.pool, *task.pool, task.target[0]]
    write(given["train"], pool)
    sifted = sift(**given, share=9, console=QUIET)
    assert sifted.selected == sorted(sifted.selected)
    assert len(sifted.selected) == 9
    assert max(sifted.selected) <= 36
    first = [f"{given['train']}:{number + 1}" for number in sifted.selected]
    copies = [f"{given['train']}:{number + 37}" for number in sifted.selected]
    target = [f"{given['train']}:{number}" for number in (1, 74)]  # without a score, and not of the rows that have one
    assert sorted(trained(given, sifted.folder / "scores.csv")) == sorted([*first, *copies, *target])
    assert trained(given, sifted.dropped) == first
    with_target = trained(given, sifted.dropped, target=str(given["target"]))
    assert [place for place in with_target if "pool" in place] == first
    assert len({place for place in with_target if "few" in place}) == 12  # although the pool has one of them


def test_the_selected_row_of_a_copy_is_listed_with_it(given, complete, no_model, task):
    write(given["train"], [*task.pool, task.pool[0]])
    sifted = sift(**given, share=36, console=QUIET)
    decisions = read_decisions(str(sifted.dropped)).selected
    assert decisions == {f"{given['train']}:1": True, f"{given['train']}:37": False}
    write(given["train"], task.pool)
    assert sift(**given, share=36, console=QUIET).dropped is None
