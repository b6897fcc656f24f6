"""Folders of resumable work: continued with the same facts, refused with others, removed if empty."""

import pytest

from siftune.base.errors import DataError, RecipeError
from siftune.base.work_folder import WorkFolder


def folder(place):
    return WorkFolder(place / "work", "work.json", "*.bin")


def result(work):
    work.write("one.bin", b"1")


def stop(work, error):
    result(work)
    raise error("stop")


def test_results_state_and_facts_are_there_again(tmp_path):
    with folder(tmp_path).begin({"seed": 0, "rates": (1, 2)}) as work:
        result(work)
        work.set_state(plan=[1])
        work.set_state(loss=0.5)
    again = folder(tmp_path).begin({"seed": 0, "rates": [1, 2]})
    assert again.has_results
    assert again.state == {"plan": [1], "loss": 0.5}


def test_other_facts_are_refused_by_name_and_nothing_is_touched(tmp_path):
    with folder(tmp_path).begin({"seed": 0, "rows": "a" * 64}) as work:
        result(work)
    left = sorted((file, file.read_bytes()) for file in work.path.iterdir())
    with pytest.raises(RecipeError, match="seed"):
        folder(tmp_path).begin({"seed": 1})
    with pytest.raises(RecipeError, match=r"rows is a{12}…, but now it is b{12}…"):
        folder(tmp_path).begin({"rows": "b" * 64})
    assert left == sorted((file, file.read_bytes()) for file in work.path.iterdir())


def test_facts_can_be_added(tmp_path):
    with folder(tmp_path).begin({"seed": 0}) as work:
        work.begin({"rows": "r"})
        result(work)
    for name in ("seed", "rows"):
        with pytest.raises(RecipeError, match=name):
            folder(tmp_path).begin({name: "other"})


def test_a_folder_without_results_starts_anew(tmp_path):
    folder(tmp_path).begin({"seed": 0}).set_state(plan=1)  # killed before its first result
    assert folder(tmp_path).begin({"seed": 1}).state == {}


@pytest.mark.parametrize("error", [None, DataError, KeyboardInterrupt])
def test_nothing_is_left_without_results(tmp_path, error):
    try:
        with folder(tmp_path).begin({}):
            if error:
                raise error("stop")
    except (DataError, KeyboardInterrupt):
        pass
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("error", "stays"), [(DataError, False), (KeyboardInterrupt, True)])
def test_results_of_refused_inputs_are_removed_and_those_of_a_cut_run_stay(tmp_path, error, stays):
    work = folder(tmp_path).begin({})
    with pytest.raises(error), work:
        stop(work, error)
    assert work.path.exists() == stays
    if stays:  # results of an earlier call are never removed
        with pytest.raises(DataError), folder(tmp_path).begin({}):
            raise DataError("stop")
        assert work.has_results


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not empty"):
        folder(tmp_path).begin({})
    (tmp_path / "work" / "work.json").write_text("{}")  # and with it, nothing is deleted
    with folder(tmp_path).begin({}):
        pass
    assert (tmp_path / "work" / "notes.txt").exists()


def test_a_damaged_record_is_refused(tmp_path):
    with folder(tmp_path).begin({"seed": 0}) as work:
        result(work)
    (work.path / "work.json").write_text('{"facts"')
    with pytest.raises(RecipeError, match=r"work\.json"):
        folder(tmp_path).begin({"seed": 0})


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "work").write_text("a file")
    with pytest.raises(RecipeError, match="cannot be written to"):
        folder(tmp_path).begin({})


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    work = folder(tmp_path).begin({})
    for number in range(2):
        work.append("lines.jsonl", {"number": number})
    with (work.path / "lines.jsonl").open("a") as file:
        file.write('{"numb')
    assert work.lines("lines.jsonl") == [{"number": 0}, {"number": 1}]
    work.append("lines.jsonl", {"number": 2})
    assert [line["number"] for line in work.lines("lines.jsonl")] == [0, 1, 2]
    assert work.lines("none.jsonl") == []
