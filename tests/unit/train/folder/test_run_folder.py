"""The run folder: files change in one move, records can be cut, half a checkpoint is none."""

import json
from typing import Any

import pytest
from support.tiny_run import lines

from siftune.base.environment import hardware, versions
from siftune.base.errors import InputError, RecipeError
from siftune.base.json_files import read_sealed
from siftune.train.folder.checkpoints import begin, is_complete, newest_checkpoint, seal, step_of
from siftune.train.folder.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "a" / "run")


def checkpoint(folder, step, state=None):
    place = folder.checkpoints / f"checkpoint-{step}"
    begin(place)
    (place / "optimizer.pt").write_bytes(b"state")
    if state is not False:
        (place / "trainer_state.json").write_text(state or json.dumps({"global_step": step}))
    seal(place)
    return place


def test_it_is_made_and_left_empty(folder):
    assert folder.path.is_dir()
    assert not list(folder.path.iterdir())
    assert folder.is_fresh()


@pytest.mark.parametrize("name", ["recipe.yaml", "rows.sha256", "bad_rows.txt", "selections.parquet"])
def test_a_failed_start_takes_back_what_it_wrote(folder, name):
    def fail():
        folder.write(name, "text")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), folder.removed_on_failure():
        fail()
    assert not folder.path.parent.exists()


@pytest.mark.parametrize(
    "make", [lambda folder: (folder.path / "adapter").mkdir(), lambda folder: checkpoint(folder, 9)]
)
def test_what_a_run_leaves_makes_it_used(folder, make):
    (folder.path / "train.jsonl").write_text("")
    assert folder.is_fresh()
    make(folder)
    assert not folder.is_fresh()


def test_a_run_that_was_killed_in_its_first_save_can_be_begun_anew(folder):
    checkpoint(folder, 9, state=False)
    assert folder.is_fresh()


def test_where_all_checkpoints_are_damaged_it_is_not_said_to_begin_in_their_place(folder):
    checkpoint(folder, 9)
    (folder.checkpoints / "checkpoint-9" / "optimizer.pt").write_bytes(b"State")
    assert not folder.is_fresh()
    with pytest.raises(InputError, match="all are damaged: train in another folder"):
        newest_checkpoint(folder.checkpoints, folder.is_fresh())


def test_a_folder_of_other_files_is_refused_unless_a_run_is_in_it(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "bad_rows.txt"):  # of a run that failed
        (tmp_path / "run" / name).write_text("")
    RunFolder(tmp_path / "run").refuse_results(resume=False)
    (tmp_path / "run" / "photo.jpg").write_text("")
    with pytest.raises(RecipeError, match=r"run is no run folder.*photo\.jpg"):
        RunFolder(tmp_path / "run").refuse_results(resume=False)
    (tmp_path / "run" / "recipe.yaml").write_text("")
    RunFolder(tmp_path / "run").refuse_results(resume=False)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"file/run .*\(Not a directory\)"):
        RunFolder(tmp_path / "file" / "run")
    with pytest.raises(RecipeError, match="file cannot be written to"):
        RunFolder(tmp_path / "file")


def test_the_adapter_is_replaced_whole_or_not_at_all(folder):
    def good(text):
        return lambda place: (place.mkdir(), (place / text).write_text(text))

    def bad(place):
        good("half")(place)
        raise KeyboardInterrupt

    folder.replace({"adapter": good("first")})
    folder.replace({"adapter": good("second")})
    assert [path.name for path in folder.adapter.iterdir()] == ["second"]
    with pytest.raises(KeyboardInterrupt):
        folder.replace({"adapter": bad})
    assert [path.name for path in folder.adapter.iterdir()] == ["second"]
    assert [path.name for path in folder.path.iterdir()] == ["adapter"]


def test_records_are_cut_behind_a_step(folder):
    for step in range(6):
        folder.append("metrics.jsonl", {"step": step + 1, "loss": 1.0})
    folder.append("metrics.jsonl", {"step": 4, "eval_loss": 1.0})
    folder.cut_records(4)
    assert [line["step"] for line in lines(folder.path / "metrics.jsonl")] == [1, 2, 3, 4, 4]
    RunFolder(folder.path / "empty").cut_records(3)


@pytest.mark.parametrize("rest", [b'{"step": 5, "lo', b"\n", b"nonsense\n", b"null\n", b"{}\n", b"[]\n", b"\xff\xfe\n"])
def test_a_record_that_was_cut_off_by_a_crash_or_is_none_is_dropped(folder, rest):
    folder.append("metrics.jsonl", {"step": 3})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    folder.cut_records(4)
    assert lines(folder.path / "metrics.jsonl") == [{"step": 3}]


def test_records_that_cannot_be_read_are_told(folder):
    (folder.path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        folder.cut_records(4)


def test_the_newest_complete_checkpoint(folder):
    with pytest.raises(InputError, match=r"checkpoint in .*checkpoints; .* --resume"):
        newest_checkpoint(folder.checkpoints, folder.is_fresh())
    folder.adapter.mkdir()  # of a finished run, into which none without --resume may write
    with pytest.raises(InputError, match=r"checkpoint in .*checkpoints; .*another folder"):
        newest_checkpoint(folder.checkpoints, folder.is_fresh())
    checkpoint(folder, 9)
    newest = checkpoint(folder, 10)
    checkpoint(folder, 11, state='{"global_step": 1')
    begin(folder.checkpoints / "checkpoint-12")
    checkpoint(folder, 13, state=False)
    (folder.checkpoints / "checkpoint-old").mkdir()
    assert newest_checkpoint(folder.checkpoints, folder.is_fresh()) == newest
    assert step_of(newest) == 10
    assert not is_complete(folder.checkpoints / "checkpoint-13")
    folder.drop_half_written()
    left = sorted(path.name for path in folder.checkpoints.iterdir())
    assert left == ["checkpoint-10", "checkpoint-9", "checkpoint-old"]


def test_a_run_is_written_with_versions_and_hardware(folder):
    folder.write_run(status="finished")
    record = read_sealed(folder.path / "run.json", dict[str, Any])
    assert record == {"status": "finished", "versions": versions(), "hardware": hardware()}


def test_weights_that_changed_since_the_end_of_a_run(folder):
    folder.adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (folder.adapter / name).write_text(name)
    assert folder.changed_weights() == []  # without run.json
    folder.write_run(status="finished", summary={"steps": 1}, weights=folder.weights())
    assert folder.has_finished(1)
    assert folder.changed_weights() == []
    (folder.adapter / "README.md").write_text("of people")
    (folder.adapter / "more").write_text("of people")
    assert folder.changed_weights() == []
    (folder.adapter / "adapter_config.json").write_text("other")
    (folder.adapter / "adapter_model.safetensors").unlink()
    assert folder.changed_weights() == ["adapter_config.json", "adapter_model.safetensors"]
    path = folder.path / "run.json"
    path.write_text(path.read_text().replace('"steps": 1', '"steps": 2'))
    assert not folder.has_finished(1)
