"""The way of a model between one owner and several data owners, by commands alone."""

import shutil

import pytest
from support.commands import EMULATE, TRAIN, error_of, siftune
from support.kits import read_json
from support.tiny_run import save_rows

from siftune.cli.main import main

LORA = (*TRAIN[:4], "--adapter", "lora", "--rank", "2", "--method", "dense", "--template", "none")


@pytest.fixture(scope="module")
def owners(half, tmp_path_factory):
    """A kit, and the runs of three data owners on it: with LoRA, and one with whole layers."""
    place = tmp_path_factory.mktemp("several")
    rows = save_rows(place / "rows.jsonl")
    emulate = ["emulate", "--model", half, "--calibration", rows, "--out", place / "kit", *EMULATE]
    assert main([*map(str, emulate)]) == 0
    for seed, (name, way) in enumerate((("a", LORA), ("b", LORA), ("c", LORA), ("full", TRAIN))):
        train = ["train", "--model", place / "kit", "--train", rows, "--out", place / name, "--seed", seed, *way]
        assert main([*map(str, train)]) == 0
    return place


def words(place, half, out, *names):
    given = [word for name in names for word in ("--return", place / name / "return")]
    return ["plug", "--model", half, "--kit", place / "kit", "--out", out, *given]


def test_three_returns_are_merged(owners, half, tmp_path, capsys):
    for name in "abc":
        assert read_json(owners / name / "return" / "manifest.json")["lora"]
        assert "of rank 2 at most" in shown(capsys, "verify", owners / name / "return", "--kit", owners / "kit")
    command = words(owners, half, tmp_path / "tuned", *"abc")
    found, _ = siftune(capsys, *command)
    assert [part["return"] for part in found["returns"]] == [f"{owners}/{name}/return" for name in "abc"]
    assert all(part["cosine"] > 0 and 0 < part["update"] < 0.25 for part in found["returns"])
    text = shown(capsys, *words(owners, half, tmp_path / "again", *"abc"))
    for name in "abc":
        assert f"{owners}/{name}/return" in text
    assert "cosine to the merged" in text


def shown(capsys, *arguments):
    """What a command prints."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("given", [("1,2",), ("1", "2"), ("1,", "2")])
def test_weights_may_be_written_either_way(owners, half, tmp_path, capsys, given):
    found, _ = siftune(capsys, *words(owners, half, tmp_path / "tuned", "a", "b"), "--weights", *given)
    assert [part["weight"] for part in found["returns"]] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]


def test_what_several_returns_refuse(owners, half, tmp_path, capsys):
    shutil.copytree(owners / "a" / "return", tmp_path / "copy" / "return")
    for names, options, said in [
        ("ab", ("--weights", "1"), "--weights"),
        ("ab", ("--weights", "1,x"), "--weights"),
        ("aa", (), f"{owners}/a/return"),
        (["a", tmp_path / "copy"], (), f"{tmp_path}/copy/return"),
        (["a", "full"], (), f"{owners}/full/return"),
        ("abc", ("--max-update", "1e-9"), f"{owners}/a/return: adapter.safetensors"),
        (["a", "none"], (), f"{owners}/none/return"),
    ]:
        assert said in error_of(capsys, *words(owners, half, tmp_path / "tuned", *names), *options), options
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
