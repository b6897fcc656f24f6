"""Links and pipes in folders of others: nothing outside of a folder is read as a part of it."""

import os
import re

import pytest

from siftune.base.errors import InputError
from siftune.base.links import check_links, is_inside


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, beside a secret."""
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja", "config.json.bak", "additional_chat_templates/a"])
def test_a_link_that_leads_out_is_refused(folder, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(folder.parent / "id_rsa")
    with pytest.raises(InputError, match=rf"{re.escape(str(path))} is a symbolic link"):
        check_links(folder)


def test_a_folder_behind_a_link_is_refused(folder):
    (folder.parent / "templates").mkdir()
    (folder / "additional_chat_templates").symlink_to(folder.parent / "templates")
    with pytest.raises(InputError, match="additional_chat_templates is a symbolic link"):
        check_links(folder)


@pytest.mark.parametrize("name", ["LICENSE", "run.json", "model.safetensors", "additional_chat_templates/a"])
def test_a_pipe_is_refused(folder, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))} is neither a file nor a folder"):
        check_links(folder)


def test_weights_may_be_on_another_disk_but_no_pipe(folder):
    (folder.parent / "weights").write_text("")
    (folder / "model.safetensors").symlink_to(folder.parent / "weights")
    check_links(folder)
    (folder.parent / "weights").unlink()
    os.mkfifo(folder.parent / "weights")
    with pytest.raises(InputError, match=r"model\.safetensors is a symbolic link"):
        check_links(folder)


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder):
    (folder / "LICENSE").symlink_to("config.json")
    (folder.parent / "link").symlink_to(folder)
    check_links(folder)
    check_links(folder.parent / "link")


def test_a_folder_of_the_hubs_cache_may_link_to_its_own_repository_alone(tmp_path):
    for name in ("models--a--b", "models--a--private"):
        snapshot = tmp_path / name / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        (tmp_path / name / "blobs").mkdir()
        (tmp_path / name / "blobs" / "1").write_text(name)
        (snapshot / "LICENSE").symlink_to("../../blobs/1")
        check_links(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    check_links(tmp_path / "link")
    (tmp_path / "models--a--b" / "snapshots" / "main" / "NOTICE").symlink_to(tmp_path / "models--a--private/blobs/1")
    with pytest.raises(InputError, match="NOTICE is a symbolic link"):
        check_links(tmp_path / "models--a--b" / "snapshots" / "main")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere cannot be read \(No such file"):
        check_links(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("rows.jsonl", True),
        ("a/../rows.jsonl", True),
        ("../model2/x", False),
        ("../../etc/passwd", False),
        ("/x", False),
    ],
)
def test_paths_that_leave_a_folder(folder, path, inside):
    assert is_inside(folder / path, folder) == inside
