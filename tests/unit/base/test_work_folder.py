"""Folders of resumable work: continued with the same facts, refused with others, removed if empty."""

import math

import pytest
from pydantic import BaseModel

from siftune.base.errors import DataError, InputError, RecipeError
from siftune.base.files import only_process
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


@pytest.mark.parametrize(
    ("old", "new"), [('"facts"', '"facts'), ('"seed": 0', '"seed": 1'), ('"plan": 1', '"plan": 2'), ('"state"', '"x"')]
)
def test_a_record_that_is_damaged_or_was_changed_is_refused(tmp_path, old, new):
    with folder(tmp_path).begin({"seed": 0}) as work:
        work.set_state(plan=1)
        result(work)
    text = (work.path / "work.json").read_text()
    (work.path / "work.json").write_text(text.replace(old, new))
    for seed in (0, 1):
        with pytest.raises(InputError, match=r"work\.json .*delete this one"):
            folder(tmp_path).begin({"seed": seed})
    assert (work.path / "work.json").read_text() == text.replace(old, new)


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "work").write_text("a file")
    with pytest.raises(RecipeError, match="cannot be written to"):
        folder(tmp_path).begin({})


def test_a_folder_with_a_link_is_refused(tmp_path):
    with folder(tmp_path).begin({}) as work:
        result(work)
    (work.path / "two.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"two\.bin is a symbolic link"):
        folder(tmp_path).begin({})


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    work = folder(tmp_path).begin({})
    for number in range(2):
        work.append("lines.jsonl", {"number": number})
    with (work.path / "lines.jsonl").open("a") as file:
        file.write('{"numb')
    assert work.lines("lines.jsonl", dict[str, int]) == [{"number": 0}, {"number": 1}]
    work.append("lines.jsonl", {"number": 2})
    assert [line["number"] for line in work.lines("lines.jsonl", dict[str, int])] == [0, 1, 2]
    assert work.lines("none.jsonl", dict[str, int]) == []


class Line(BaseModel):
    number: int
    values: list[float]


def test_a_line_that_was_changed_or_is_of_another_form_is_dropped_alone_and_in_the_file(tmp_path, caplog):
    work, path = folder(tmp_path).begin({}), tmp_path / "work" / "lines.jsonl"
    for number in range(5):
        work.append("lines.jsonl", {"number": number, "values": [number / 3, math.nan]})
    work.append("lines.jsonl", {"number": "5", "values": []})
    sound = path.read_text().splitlines()
    path.write_text("\n".join(sound).replace("0.333", "0.334").replace('"number": 3', '"number": 4') + "\n")
    lines = work.lines("lines.jsonl", Line)
    assert [(line.number, line.values[0]) for line in lines] == [(0, 0.0), (2, 2 / 3), (4, 4 / 3)]
    assert "damaged lines are dropped, and computed again: 3" in caplog.text
    assert path.read_text().splitlines() == [sound[number] for number in (0, 2, 4)]


def test_a_second_process_is_refused_and_changes_nothing(tmp_path):
    with folder(tmp_path).begin({"seed": 0}) as work:
        before = {path: path.read_bytes() for path in work.path.iterdir()}
        for seed in (0, 3):
            with pytest.raises(InputError, match="another process"):
                folder(tmp_path).begin({"seed": seed})
        with pytest.raises(InputError, match="another process"), folder(tmp_path).begin({"seed": 3}):
            pass
        assert {path: path.read_bytes() for path in work.path.iterdir()} == before
        work.begin({"rows": "r"})  # the same process may add facts
        result(work)
    with pytest.raises(RecipeError, match="seed is 0, but now it is 3"):
        folder(tmp_path).begin({"seed": 3})
    with folder(tmp_path).begin({"seed": 0, "rows": "r"}) as again:  # neither refusal has left a lock
        assert again.has_results


def test_the_end_of_an_inner_block_does_not_end_the_lock(tmp_path):
    with folder(tmp_path).begin({"seed": 0}) as work:
        with work.begin({"rows": "r"}):
            result(work)
        with pytest.raises(InputError, match="another process"):
            folder(tmp_path).begin({"seed": 0})
    assert folder(tmp_path).begin({"seed": 0}).has_results


def test_a_lock_is_of_the_folder_that_is_there(tmp_path, monkeypatch):
    """A process may open the folder just before another one removes it."""
    import fcntl

    place, lock, removed = tmp_path / "work", fcntl.flock, []

    def remove_first(handle, kind):
        if not removed:
            removed.append(place.rmdir())
        lock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with only_process(place):
        assert removed
        assert place.is_dir()
        with pytest.raises(InputError, match="another process"), only_process(place):
            pass


def test_a_removed_folder_of_another_process_stays(tmp_path):
    with folder(tmp_path).begin({"seed": 0}) as work:
        work.remove()
        other = folder(tmp_path).begin({"seed": 1})
    assert other.path.exists()
