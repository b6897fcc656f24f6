"""Run folders of another party: nothing is written through a link, and two processes never share a folder."""

import json
import shutil

import pytest
from rich.console import Console
from support.tiny_run import recipe, save_rows

from siftune.base.errors import InputError
from siftune.base.files import only_process
from siftune.train.folder.run_folder import RunFolder
from siftune.train.run import train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run of two steps with a checkpoint after each, a function for recipes that resume it, and its file names."""
    place = tmp_path_factory.mktemp("finished")
    rows = save_rows(place / "rows.jsonl", 8)

    def again(out, **settings):
        return recipe(base, rows, out, save_every=1, **{"steps": 2, "method": "gast", "select": 0.5, **settings})

    train(again(place / "run"), QUIET)
    return place / "run", again


def names_of(run):
    """Every name that a run writes, and the names beside them under which files are written before they are moved."""
    written = [path.relative_to(run) for path in run.rglob("*")]
    top = [path for path in written if len(path.parts) == 1]
    beside = [path.with_name(f".{path.name}.{end}") for path in top for end in ("partial", "old")]
    marks = [path / ".unfinished" for path in written if path.name.startswith("checkpoint-")]
    return [*written, *beside, *marks]


def test_a_link_at_any_name_that_a_run_writes_is_refused_before_anything_is_written(finished, tmp_path):
    run, _ = finished
    names = names_of(run)
    assert {"metrics.jsonl", "selections.parquet", "checkpoints", "adapter"} <= {str(name) for name in names}
    assert sum(name.name in ("optimizer.pt", "trainer_state.json", ".unfinished") for name in names) == 6
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        place = copy / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        place.symlink_to(outside if (run / name).is_dir() else outside / "file")
        before = sorted(copy.rglob("*"))
        with pytest.raises(InputError, match=name.name):
            RunFolder(copy)
        assert sorted(copy.rglob("*")) == before
        assert [path.read_text() for path in outside.iterdir()] == ["mine"]
        shutil.rmtree(copy)


def test_an_unfinished_checkpoint_is_removed_and_not_written_into(finished, tmp_path):
    run, again = finished
    shutil.copytree(run, tmp_path / "run")
    later = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    (later / ".unfinished").write_bytes(b"")
    (later / "foreign").write_text("left by a killed run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    train(again(tmp_path / "run", resume=True), QUIET)
    assert not (later / "foreign").exists()
    assert json.loads((later / "trainer_state.json").read_text())["global_step"] == 2


def test_a_second_process_in_a_run_folder_ends_at_once(finished, tmp_path):
    run, again = finished
    shutil.copytree(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with only_process(tmp_path / "run"), pytest.raises(InputError, match="another process"):
        train(again(tmp_path / "run", resume=True, steps=3), QUIET)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    with only_process(tmp_path / "run"):
        pass
