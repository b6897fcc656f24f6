"""Data sets of several files: which rows are read."""

import json
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest

from siftune.base.errors import DataError
from siftune.data.read import load_rows

GOOD = {"prompt": "1 + 1 =", "completion": " 2"}


def refused(source, split="train"):
    with pytest.raises(DataError) as caught:
        load_rows(str(source), split)
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
def test_a_folder_is_read_completely_or_refused(tmp_path, name):
    """Beside names with splits, `datasets` leaves out all others."""
    for place in ("train.jsonl", "test.jsonl", name):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / place, GOOD)
    assert refused(tmp_path).startswith(f"{tmp_path}: {name} would not be read")
    (tmp_path / name).unlink()
    assert len(load_rows(str(tmp_path))) == 1


@pytest.mark.parametrize(
    "config", ["data_files: 5", "data_files: *a", "- - -", "data_files: {{a: {{b: ../rows.jsonl}}}}"]
)
def test_a_card_of_another_form_is_refused(tmp_path, config):
    jsonl(tmp_path / "data.jsonl", GOOD)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {config}\n---\n")
    assert "could be loaded" in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"[", b"\xff", b"[]", b'{"_data_files": 5}', b'{"_data_files": [[]]}', b'{"_data_files": []}'],
)
def test_a_damaged_state_is_refused(tmp_path, content):
    datasets.Dataset.from_list([GOOD]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_bytes(content)
    assert "save the data set again" in refused(tmp_path / "saved")


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


def test_a_hub_failure_says_what_to_do(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach the hub.\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    message = refused("org/none")
    assert "org/none is no data file" in message
    assert "Couldn't reach the hub; check the name" in message
