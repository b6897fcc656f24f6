"""What a run trains and measures on: all bad rows told together, files put together, rows held out."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from support.tiny_run import recipe, save_rows
from support.tokenizer import byte_tokenizer

from siftune.base.errors import DataError, RecipeError
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.recipe.training_rows import read_rows, used_rows
from siftune.train.prepare import prepare, rows_line, trained_and_held_out
from siftune.train.run import train

QUIET = Console(quiet=True)
GOOD = [json.dumps({"prompt": f"{i}?", "completion": str(i)}) for i in range(6)]
LONG = json.dumps({"prompt": "x" * 90, "completion": "y"})
HEAVY = json.dumps({"prompt": "a", "completion": "b", "weight": "much"})


@pytest.fixture
def mixed(tmp_path):
    """A file in which five of eleven rows are bad, each in another way."""
    path = tmp_path / "mixed.jsonl"
    bad = ["{", json.dumps({"prompt": "no completion"}), '"a text"', LONG, HEAVY]
    path.write_text("\n".join([*GOOD[:3], *bad, *GOOD[3:]]), encoding="utf-8")
    return path


def prepared(given):
    return prepare(given, byte_tokenizer(), read_rows(given))


def answers(part):
    return [row.completion for row in part]


def test_all_bad_rows_are_told_together_by_file_and_line(tmp_path, mixed):
    with pytest.raises(DataError) as caught:
        prepared(recipe(tmp_path, mixed, tmp_path / "run"))
    head, *named = str(caught.value).split("\n  ")
    assert head.startswith("5 rows cannot be used")
    assert "--bad-rows drop" in head
    assert [line.partition(": ")[0] for line in named] == [f"{mixed}:{number}" for number in (4, 5, 6, 8, 7)]
    for line, words in zip(
        named, ("invalid JSON", "'completion' is missing", "a string", "'weight'", "90"), strict=True
    ):
        assert words in line


def test_where_all_rows_are_bad_they_are_told_and_not_the_share(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("{\n{\n")
    with pytest.raises(DataError, match=r"(?s)2 rows.*bad\.jsonl:1.*bad\.jsonl:2"):
        prepared(recipe(tmp_path, path, tmp_path / "run", eval_share=0.5))


def test_of_many_bad_rows_the_first_twenty_are_named(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join([*GOOD, *(json.dumps({f"column{number}": "x"}) for number in range(25))]))
    with pytest.raises(DataError) as caught:
        prepared(recipe(tmp_path, path, tmp_path / "run"))
    assert len(str(caught.value).splitlines()) == 22
    assert "… and 5 more" in str(caught.value)


def test_rows_with_the_same_fault_are_one_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"frage": f"{i}", "antwort": "b"}) for i in range(400)))
    with pytest.raises(DataError) as caught:
        prepared(recipe(tmp_path, path, tmp_path / "run"))
    assert len(str(caught.value).splitlines()) == 1
    assert f"{path}:3 and 397 more" in str(caught.value)
    assert "--columns prompt=frage completion=antwort" in str(caught.value)


def test_repeated_training_rows_are_reported(tmp_path, caplog):
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join([*GOOD, *GOOD[:2]]))
    prepared(recipe(tmp_path, path, tmp_path / "run", lr=1e3))
    assert "2 of 8 training rows repeat earlier ones" in caplog.text
    assert "lr is 1000" in caplog.text


def test_bad_rows_of_a_file_that_is_named_twice_are_told_once(tmp_path, mixed):
    given = recipe(tmp_path, mixed, tmp_path / "run", train=(str(mixed), str(mixed)), bad_rows="drop")
    assert len(prepared(given).bad) == 5


def test_bad_rows_are_dropped_where_the_recipe_says_so(tmp_path, mixed):
    found = prepared(recipe(tmp_path, mixed, tmp_path / "run", bad_rows="drop"))
    assert answers(found.rows["train"]) == list("012345")
    assert found.data["train"]["row"][:] == list(range(6))
    assert len(found.bad) == 5


def test_nothing_but_bad_rows_is_refused_with_one_of_them(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text(f"{LONG}\n{LONG}")
    with pytest.raises(DataError, match=r"rows to train on .*none.jsonl:1, .*: the prompt"):
        prepared(recipe(tmp_path, path, tmp_path / "run", bad_rows="drop"))


@pytest.mark.parametrize("bad", [LONG, json.dumps({"prompt": "no completion"})])
@pytest.mark.parametrize(
    ("name", "words"),
    [("train", "other training rows"), ("target", "rows of the target"), ("eval", "rows to measure on")],
)
def test_a_file_of_nothing_but_bad_rows_is_refused(tmp_path, bad, name, words):
    files = {each: save_rows(tmp_path / f"{each}.jsonl") for each in ("train", "target", "eval")}
    files[name].write_text(f"{bad}\n{bad}\n")
    given = {each: str(file) for each, file in files.items()}
    with pytest.raises(DataError, match=rf"none of the {words} can be used: .*{name}.jsonl:1"):
        prepared(recipe(tmp_path, files["train"], tmp_path / "run", bad_rows="drop", **given))


def test_a_list_of_all_rows_of_the_target_is_refused(tmp_path):
    few, dropped = save_rows(tmp_path / "few.jsonl", 2), tmp_path / "dropped.txt"
    dropped.write_text(f"{few}:1\n{few}:2\n")
    given = {"target": str(few), "drop_rows": str(dropped)}
    with pytest.raises(DataError, match=r"rows of the target .*--drop-rows"):
        prepared(recipe(tmp_path, save_rows(tmp_path / "rows.jsonl"), tmp_path / "run", **given))


def test_rows_of_a_source_that_is_called_target_are_no_rows_of_the_target(tmp_path):
    pool, few = tmp_path / "pool.jsonl", save_rows(tmp_path / "few.jsonl", 2)
    pool.write_text("\n".join(json.dumps({**json.loads(row), "source": "target"}) for row in GOOD))
    data = prepared(recipe(tmp_path, pool, tmp_path / "run", method="dense", target=str(few))).data["train"]
    assert data["aimed"][:] == [False] * 6 + [True] * 2


def test_held_out_rows_have_no_weights(tmp_path):
    heavy = tmp_path / "heavy.jsonl"
    heavy.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": str(i), "weight": 9}) for i in range(3)))
    data = prepared(recipe(tmp_path, heavy, tmp_path / "run", eval=str(heavy))).data
    assert {name: "weight" in part.column_names for name, part in data.items()} == {"train": True, "eval": False}


def test_bad_rows_of_a_run_are_in_its_folder_and_told(base, mixed, tmp_path):
    told = io.StringIO()
    done = train(recipe(base, mixed, tmp_path / "run", bad_rows="drop", steps=1), Console(file=told, width=500))
    assert len((done.folder.path / "bad_rows.txt").read_text().splitlines()) == 5
    used = used_rows(done.folder.path, load_recipe(done.folder.path / "recipe.yaml"))
    assert answers(used["train"]) == list("012345")
    assert told.getvalue().startswith(f"5 rows left out:\n  {mixed}:4: invalid JSON")
    assert "6 rows to train on: " in told.getvalue()
    assert " of 4 rows\n" in told.getvalue()


def test_a_run_without_bad_rows_keeps_no_list_of_an_earlier_one(base, rows, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bad_rows.txt").write_text(f"{rows}:1: it was bad\n")
    done = train(recipe(base, rows, tmp_path / "run", steps=1), QUIET)
    assert len(used_rows(done.folder.path, load_recipe(done.folder.path / "recipe.yaml"))["train"]) == 24


# several files, and shares of them


@pytest.fixture
def two(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("\n".join(GOOD[:4]))
    second.write_text("\n".join(GOOD[4:]))
    return str(first), str(second)


def test_files_are_put_together(tmp_path, two):
    given = recipe(tmp_path, tmp_path, tmp_path / "run", train=two)
    assert answers(read_rows(given).parts["train"]) == list("012345")
    given = recipe(tmp_path, tmp_path, tmp_path / "run", train=two, limit=1)
    assert answers(read_rows(given).parts["train"]) == ["0", "4"]


def test_a_share_that_holds_out_none_or_all_is_refused(tmp_path, two):
    for share, words in ((0.0001, "holds out none"), (0.999, "leaves none to train on")):
        with pytest.raises(DataError, match=rf"eval_share {share:g} of 6 rows {words}"):
            read_rows(recipe(tmp_path, tmp_path, tmp_path / "run", train=two, eval_share=share))


def test_a_run_measures_the_share_that_it_holds_out_and_goes_on_with_it(base, rows, tmp_path):
    given = recipe(base, rows, tmp_path / "run", method="dense", eval_share=0.3, steps=2, save_every=2)
    done = train(given, QUIET)
    assert done.summary["eval_loss"] is not None
    assert load_recipe(done.folder.path / "recipe.yaml").eval_share == 0.3
    with pytest.raises(RecipeError, match="other training rows"):
        train(recipe(base, rows, tmp_path / "run", method="dense", eval_share=0.5, steps=3, resume=True), QUIET)


def test_a_row_that_the_target_names_is_trained_on_and_not_held_out(tmp_path):
    path, few = save_rows(tmp_path / "rows.jsonl", 60), tmp_path / "few.jsonl"
    given = recipe(tmp_path, path, tmp_path / "run", method="dense", eval_share=0.3)
    before = answers(read_rows(given).parts["eval"])
    few.write_text(
        "".join(line for line in path.read_text().splitlines(True) if json.loads(line)["completion"] == before[0])
    )
    parts = read_rows(replace(given, target=str(few))).parts
    assert answers(parts["eval"]) == before[1:]
    assert before[0] in answers(parts["train"])


def test_held_out_rows_that_are_trained_on_are_told(rows, tmp_path):
    """Six rows of a file of its own, of which two are also among the 24."""
    held = tmp_path / "held.jsonl"
    held.write_text("".join([*rows.read_text().splitlines(True)[3:5], *(line + "\n" for line in GOOD[:4])]))
    given = recipe(tmp_path, rows, tmp_path / "run", eval=str(held))
    assert "24 rows to train on, 6 rows held out (2 of them are training rows too" in rows_line(given, prepared(given))
    share = recipe(tmp_path, rows, tmp_path / "run", eval_share=0.3)
    assert trained_and_held_out(prepared(share).rows) == 0


def test_a_recipe_holds_several_files(base, two, tmp_path):
    done = train(recipe(base, tmp_path, tmp_path / "run", train=two, steps=1), QUIET)
    again = load_recipe(done.folder.path / "recipe.yaml")
    assert again.train == two
    assert "first.jsonl`, `" in (done.folder.path / "README.md").read_text()
    assert "second.jsonl`." in (done.folder.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval": "rows.jsonl", "eval_share": 0.1}, "eval and eval_share both"),
        ({"eval_share": 1.0}, "eval_share is 1.0"),
        ({"train": ()}, "no training data"),
        ({"target_share": 0.5}, "target_share has no effect"),
        ({"bad_rows": "skip"}, "bad_rows is 'skip'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(tmp_path, rows, settings, words):
    with pytest.raises(RecipeError, match=words):
        check(recipe(tmp_path, rows, tmp_path / "run", **settings))
