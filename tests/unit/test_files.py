"""Folders that are there whole or not at all."""

import pytest

from siftune.errors import ModelError
from siftune.files import new_folder, refuse_full


def test_a_folder_is_there_at_the_end_and_not_before(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_one_that_failed(tmp_path, error):
    def fail():
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_process_left_is_thrown_away(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "old").write_text("")
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


def test_an_empty_folder_is_filled_also_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with new_folder(".") as folder:
        (folder / "x").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert (tmp_path / "empty" / "x").read_text() == "1"


def test_what_is_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for out, words in [("full", "is not empty"), ("file", r"Not a directory"), ("file/below", r"cannot be written to")]:
        with pytest.raises(ModelError, match=words), new_folder(tmp_path / out):
            pytest.fail("nothing may be written")
    with pytest.raises(ModelError, match="is not empty; give another folder with --out"):
        refuse_full(tmp_path / "full")
    refuse_full(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "mine"
