"""Files and folders that are there whole or not at all."""

import errno
import os

import pytest
from safetensors import SafetensorError

from siftune.base.errors import InputError, ModelError, TrainingError
from siftune.base.files import (
    disk_faults,
    new_folder,
    open_to_append,
    refuse_full,
    refuse_links,
    writable_folder,
    write_beside,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_and_folders_are_replaced_together(tmp_path):
    (tmp_path / "text").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("")
    with write_beside(tmp_path / "text", tmp_path / "folder", tmp_path / "new") as [text, folder, new]:
        text.write_text("new")
        folder.mkdir()
        (folder / "new").write_text("")
        new.write_bytes(b"")
        assert (tmp_path / "text").read_text() == "old"
        assert names(tmp_path / "folder") == ["old"]
    assert (tmp_path / "text").read_text() == "new"
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder", "new", "text"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_replaced_after_an_error(tmp_path, error):
    (tmp_path / "a").write_text("old")

    def fail():
        with write_beside(tmp_path / "a", tmp_path / "b") as [a, b]:
            a.write_text("new")
            b.mkdir()
            (b / "half").write_text("")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_file_takes_no_folders_place(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(InputError, match="is a folder"), write_beside(tmp_path / "folder") as [beside]:
        beside.write_text("new")
    assert names(tmp_path / "folder") == ["mine"]
    assert names(tmp_path) == ["folder"]


def test_what_lies_beside_from_before_is_thrown_away(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".b.partial").write_text("half")
    with write_beside(tmp_path / "a", tmp_path / "b") as [a, b]:
        assert not a.exists()
        assert not b.exists()
        a.write_text("")
        b.mkdir()
    assert names(tmp_path) == ["a", "b"]


def test_a_folder_is_made_and_tried(tmp_path):
    writable_folder(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"exists|directory"):
        writable_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), os.strerror(errno.ENOSPC)),
        (SafetensorError("I/O error: os error 28"), "I/O error: os error 28"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "could not be written to its end"),
    ],
)
def test_a_fault_of_the_disk_is_one_sentence_with_the_file(tmp_path, error, reason):
    """The file that was being written is the newest, since these errors name none."""
    (tmp_path / "old").write_text("")
    os.utime(tmp_path / "old", (0, 0))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "part.bin").write_text("")
    with (
        pytest.raises(TrainingError, match=rf"part\.bin .*{reason}"),
        disk_faults(tmp_path),
    ):
        raise error


def test_the_advice_holds_without_a_checkpoint_and_for_a_limit_on_files(tmp_path):
    with pytest.raises(TrainingError) as error, disk_faults(tmp_path):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert "`ulimit -f`" in str(error.value)
    assert f"checkpoint in {tmp_path}, if there is one" in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: os error 28"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"),
    ],
)
def test_a_fault_of_the_disk_names_the_file_at_its_place(tmp_path, error):

    def write():
        with write_beside(tmp_path / "a", tmp_path / "b") as [a, b]:
            a.write_text("complete")
            os.utime(a, (0, 0))
            b.mkdir()
            (b / "weights").write_text("hal")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value.filename == str(tmp_path / "b" / "weights")
    assert names(tmp_path) == []


def test_a_line_that_does_not_fit_names_its_file(tmp_path):
    with pytest.raises(OSError, match="too large") as caught, open_to_append(tmp_path / "lines"):
        raise OSError(errno.EFBIG, "File too large")
    assert caught.value.filename == str(tmp_path / "lines")
    with pytest.raises(OSError, match="reset") as caught, open_to_append(tmp_path / "lines"):
        raise OSError(errno.ECONNRESET, "Connection reset by peer")
    assert caught.value.filename is None


def test_another_fault_is_passed_on(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), disk_faults(tmp_path):
        raise RuntimeError("shapes do not fit")


def test_a_folder_that_is_filled_meanwhile_is_left_alone(tmp_path):
    def fill():
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("ours")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "x").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        fill()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "theirs"


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
    with pytest.raises(ModelError, match="full is not empty"):
        refuse_full(tmp_path / "full")
    refuse_full(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [".a.partial", ".a.old", "a"])
@pytest.mark.parametrize("target", ["file", "folder"])
def test_writing_beside_touches_nothing_behind_a_link(tmp_path, name, target):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / name).symlink_to(outside / "file" if target == "file" else outside)

    def write():
        with write_beside(inside / "a") as [beside]:
            beside.write_text("new")

    if (name, target) == ("a", "folder"):
        with pytest.raises(InputError):
            write()
    else:
        write()
        assert (inside / "a").read_text() == "new"
        assert not (inside / "a").is_symlink()
    assert names(outside) == ["file"]
    assert (outside / "file").read_text() == "mine"


def test_appending_follows_no_link(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic links") as caught, open_to_append(tmp_path / "link"):
        pass
    assert caught.value.errno == errno.ELOOP
    for line in ("a\n", "b\n"):
        with open_to_append(tmp_path / "new") as file:
            file.write(line)
    assert (tmp_path / "new").read_text() == "a\nb\n"
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize("depth", ["", "sub", "sub/deeper"])
@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "link to nothing", "pipe"])
def test_folders_with_links_are_refused_by_name(tmp_path, depth, kind):
    place = tmp_path / "run" / depth
    place.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(place / "odd")
    else:
        targets = {"link to a file": "/etc/hostname", "link to a folder": "/etc", "link to nothing": "/no/such"}
        (place / "odd").symlink_to(targets[kind])
    with pytest.raises(InputError, match="odd"):
        refuse_links(tmp_path / "run")


def test_plain_folders_pass_and_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "run" / "sub").mkdir(parents=True)
    (tmp_path / "run" / "sub" / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    refuse_links(tmp_path / "run")
    refuse_links(tmp_path / "link")
    refuse_links(tmp_path / "missing")
