"""Data sets of several files: which rows are read, and that no file elsewhere is read as theirs."""

import json
import os
import shutil
from itertools import pairwise
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest

from siftune.base.errors import DataError
from siftune.data.read import load_rows

GOOD = {"prompt": "1 + 1 =", "completion": " 2"}
SECRET = {"prompt": "who?", "completion": "what nobody may see"}


def refused(source, split="train"):
    with pytest.raises(DataError) as caught:
        load_rows(str(source), split)
    assert SECRET["completion"] not in str(caught.value)
    return str(caught.value)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_folders_of_save_to_disk(tmp_path):
    data = datasets.Dataset.from_list([GOOD, GOOD])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert [row.origin for row in load_rows(str(tmp_path / "one"))] == [f"{tmp_path}/one row {n}" for n in (1, 2)]
    assert len(load_rows(str(tmp_path / "two"), "test")) == 1
    assert [row.origin for row in load_rows(f"{tmp_path}/two@test", "train")] == [f"{tmp_path}/two@test row 1"]
    with pytest.raises(DataError, match="no split 'dev'"):
        load_rows(str(tmp_path / "two"), "dev")


def test_a_split_of_a_folder_of_files(tmp_path):
    for name, count in (("train", 1), ("test", 2)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n' * count)
    assert len(load_rows(str(tmp_path), "train")) == 1
    assert len(load_rows(f"{tmp_path}@test", "train")) == 2


@pytest.mark.parametrize("name", ["extra.jsonl", "more/extra.jsonl"])
def test_a_folder_is_read_completely_or_refused(tmp_path, caplog, name):
    """Beside names with splits, `datasets` leaves out all others."""
    caplog.set_level("INFO")
    for place in ("train.jsonl", "test.jsonl", name):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / place, GOOD)
    assert refused(tmp_path).startswith(f"{tmp_path}: {name} would not be read")
    (tmp_path / name).unlink()
    assert len(load_rows(str(tmp_path))) == 1
    assert f"{tmp_path}: reading train.jsonl" in caplog.messages


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of one file, beside a secret."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    jsonl(tmp_path / "secret.jsonl", SECRET)
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "data.jsonl", GOOD)
    return tmp_path / "set"


def card(folder, config, name="README.md"):
    header = f"configs:\n- config_name: default\n  {config}\n"
    (folder / name).write_text(f"---\n{header}---\n" if name == "README.md" else header)


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_may_name_files_of_its_folder(folder, caplog, name):
    caplog.set_level("INFO")
    card(folder, "data_files: data.jsonl", name)
    jsonl(folder / "other.jsonl", GOOD, GOOD)
    assert [row.completion for row in load_rows(str(folder))] == [" 2"]
    assert f"{folder}: reading data.jsonl" in caplog.messages


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "config",
    [
        "data_files: ../secret.jsonl",
        "data_files: '{parent}/secret.jsonl'",
        "data_files: ../*.jsonl",
        "data_dir: ..",
        "data_files: [data.jsonl, ../secret.jsonl]",
        "data_files:\n  - split: train\n    path: [data.jsonl, ../secret.jsonl]",
        "data_files:\n  - split: train\n    path: data.jsonl\n  - split: test\n    path: ../secret.jsonl",
        "data_files: zip://*.jsonl::../secret.zip",
        "data_files: https://localhost:1/secret.jsonl",
    ],
)
def test_a_card_that_names_a_file_elsewhere_is_refused(folder, config, name):
    card(folder, config.format(parent=folder.parent), name)
    message = refused(folder)
    assert message.startswith(f"{folder} takes rows from ")


@pytest.mark.parametrize(
    "config", ["data_files: 5", "data_files: *a", "- - -", "data_files: {{a: {{b: ../secret.jsonl}}}}"]
)
def test_a_card_of_another_form_is_refused(folder, config):
    card(folder, config)
    assert "could be loaded" in refused(folder)


def test_a_card_may_have_addresses_elsewhere(folder):
    (folder / "README.md").write_text("---\nlicense_link: https://localhost:1/LICENSE\n---\n")
    assert len(load_rows(str(folder))) == 1


def test_a_card_of_endless_aliases_is_refused(folder):
    names = "abcdefghijklmnopqrstuvwxyz"
    deeper = [f"  {one}: &{one} [{', '.join(['*' + before] * 9)}]" for before, one in pairwise(names)]
    card(folder, "\n".join(["a: &a [data.jsonl]", *deeper, "  data_files: *z"]))
    assert f"the card of {folder} has aliases" in refused(folder)


def test_a_file_behind_a_link_is_refused(folder):
    (folder / "more.jsonl").symlink_to(folder.parent / "secret.jsonl")
    assert f"takes rows from {folder}/more.jsonl" in refused(folder)


def test_a_pipe_in_a_folder_is_not_read(folder):
    os.mkfifo(folder / "more.jsonl")
    assert len(load_rows(str(folder))) == 1


# save_to_disk


@pytest.fixture
def saved(tmp_path):
    """A saved data set beside another one, and a function that changes its state.json."""
    datasets.Dataset.from_list([SECRET]).save_to_disk(tmp_path / "other")
    datasets.Dataset.from_list([GOOD]).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / "state.json"

    def change(**fields):
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return tmp_path / "saved"

    return change


FILE = "data-00000-of-00001.arrow"


def test_the_files_of_a_saved_data_set_are_reported(saved, caplog):
    caplog.set_level("INFO")
    assert [row.completion for row in load_rows(str(saved()))] == [" 2"]
    assert f"{saved()}: reading {FILE}" in caplog.messages


@pytest.mark.parametrize("name", [f"../other/{FILE}", "{parent}/other/" + FILE, f"x/../../other/{FILE}"])
def test_a_saved_data_set_that_names_a_file_elsewhere_is_refused(saved, tmp_path, name):
    folder = saved(_data_files=[{"filename": name.format(parent=tmp_path)}])
    assert "takes rows from" in refused(folder)


@pytest.mark.parametrize("name", [FILE, "dataset_info.json"])
def test_links_and_pipes_in_a_saved_data_set_are_refused(saved, tmp_path, name):
    path = saved() / name
    path.unlink()
    path.symlink_to(tmp_path / "other" / name)
    assert "takes rows from" in refused(saved())
    path.unlink()
    os.mkfifo(path)
    assert "is neither a file nor a folder" in refused(saved())


def test_a_split_elsewhere_is_refused(tmp_path):
    data = datasets.Dataset.from_list([GOOD])
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "two")
    datasets.Dataset.from_list([SECRET]).save_to_disk(tmp_path / "other")
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "../other"]}')
    assert "takes rows from" in refused(tmp_path / "two", "../other")
    shutil.rmtree(tmp_path / "two" / "train")
    (tmp_path / "two" / "train").symlink_to(tmp_path / "other")
    assert "takes rows from" in refused(tmp_path / "two")


@pytest.mark.parametrize(
    "content",
    [b"[", b"\xff", b"[" * 100_000, b"[]", b'{"_data_files": 5}', b'{"_data_files": [[]]}', b'{"_data_files": []}'],
)
def test_a_damaged_state_is_refused(saved, content):
    folder = saved()
    (folder / "state.json").write_bytes(content)
    assert "save the data set again" in refused(folder)


def test_values_that_python_lacks_are_bad_rows(tmp_path):
    dates = pa.array([2**30, 1, 2**30], pa.date32())
    table = pa.table({"prompt": ["a", "b", "c"], "completion": ["d", "e", "f"], "x": dates})
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    bad: list[DataError] = []
    assert [row.completion for row in load_rows(f"{tmp_path}/saved", bad=bad)] == ["e"]
    assert [str(error).split(":")[0] for error in bad] == [f"{tmp_path}/saved row {n}" for n in (1, 3)]


def test_no_file_is_opened_that_a_row_names_as_its_picture(tmp_path):
    text = datasets.Value("string")
    media = {"picture": datasets.Image(), "pictures": datasets.List(datasets.Image()), "in": {"a": datasets.Image()}}
    features = datasets.Features({"prompt": text, "completion": text, **media})
    path = tmp_path / "none.png"
    path.touch()
    picture = {"path": str(path), "bytes": None}
    row = {**GOOD, "picture": picture, "pictures": [picture], "in": {"a": picture}}
    table = pa.Table.from_pylist([row], schema=features.arrow_schema)  # encoding pictures would need Pillow
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    path.unlink()
    (found,) = load_rows(f"{tmp_path}/saved")
    assert found.extra == {}


def test_turns_of_several_forms_are_read(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    data = datasets.Dataset.from_dict({"messages": [turns]}, on_mixed_types="use_json")
    data.save_to_disk(tmp_path / "saved")
    assert [row.completion for row in load_rows(f"{tmp_path}/saved")] == ["b"]


# hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for data sets on the hub with these files; it records what is asked for."""

    def answer(files):
        def build(*arguments):
            asked.append(arguments)
            return SimpleNamespace(
                config=SimpleNamespace(data_files=files),
                download_and_prepare=lambda: asked.append("prepared"),
                as_dataset=lambda split: asked.append(split) or datasets.Dataset.from_list([GOOD, GOOD]),
            )

        asked = []
        monkeypatch.setattr(datasets, "load_dataset_builder", build)
        return asked

    return answer


def test_hub_rows_and_configuration(hub):
    asked = hub({"test": ["hf://datasets/org/sums@abc/main/test.jsonl"]})
    rows = load_rows("org/sums:main@test[:2]", limit=1)
    assert asked == [("org/sums", "main"), "prepared", "test[:2]"]
    assert [row.origin for row in rows] == ["org/sums:main@test[:2] row 1"]
    asked.clear()
    load_rows("org/sums")
    assert asked == [("org/sums", None), "prepared", "train"]


@pytest.mark.parametrize(
    "file",
    [
        "/home/user/secret.jsonl",
        "file:///home/user/secret.jsonl",
        "hf://datasets/org/private@abc/rows.jsonl",
        "hf://datasets/org/sums-private@abc/rows.jsonl",
        "https://localhost:1/rows.jsonl",
        "zip://rows.jsonl::/home/user/secret.zip",
        "hf://datasets/org/sums@abc/a.zip::/home/user/secret.zip",
    ],
)
def test_a_data_set_of_the_hub_that_names_a_file_elsewhere_is_refused(hub, file):
    asked = hub({"train": ["hf://datasets/org/sums@abc/rows.jsonl", file]})
    assert f"org/sums takes rows from {file}" in refused("org/sums")
    assert asked == [("org/sums", None)]


def test_a_hub_failure_says_what_to_do(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach the hub.\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    message = refused("org/none")
    assert "org/none is no data file" in message
    assert "Couldn't reach the hub; check the name" in message
