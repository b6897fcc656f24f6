"""The way of a model between one owner and several data owners, over two rounds, by commands alone."""

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


def test_three_returns_and_a_second_round(owners, half, tmp_path, capsys):
    for name in "abc":
        assert read_json(owners / name / "return" / "manifest.json")["lora"]
        assert "of rank 2 at most" in shown(capsys, "verify", owners / name / "return", "--kit", owners / "kit")
    command = words(owners, half, tmp_path / "tuned", *"abc")
    found, _ = siftune(capsys, *command, "--clip-norm", "1")
    assert [part["return"] for part in found["returns"]] == [f"{owners}/{name}/return" for name in "abc"]
    assert sorted(part["clipped"] for part in found["returns"]) in ([False, False, True], [False] * 3)
    assert all(part["cosine"] > 0 and 0 < part["update"] < 0.25 for part in found["returns"])
    text = shown(capsys, *words(owners, half, tmp_path / "again", *"abc"), "--merge", "trimmed")
    for name in "abc":
        assert f"{owners}/{name}/return" in text
    assert "cosine to the merged" in text

    round_two = ("emulate", "--model", half, "--from", tmp_path / "tuned", "--kit", owners / "kit")
    made, said = siftune(capsys, *round_two, "--out", tmp_path / "kit2")
    assert made["moved"] == []
    assert "besides the layers to tune: as it was, bit for bit" in said
    siftune(capsys, "verify", tmp_path / "kit2")
    siftune(
        capsys, "train", "--model", tmp_path / "kit2", "--train", owners / "rows.jsonl", "--out", tmp_path / "d", *LORA
    )
    last = ("plug", "--kit", tmp_path / "kit2", "--return", tmp_path / "d" / "return", "--out", tmp_path / "tuned2")
    assert "fingerprint" in error_of(capsys, *last, "--model", half)
    found, _ = siftune(capsys, *last, "--model", tmp_path / "tuned")
    [part] = found["returns"]
    assert (part["cosine"], part["weight"], part["factor"]) == (1.0, 1.0, 1.0)
    assert f"return {owners}/a/return: manifest.json: kit is" in error_of(
        capsys, *words(owners, half, tmp_path / "tuned3", "a")[:3], "--kit", tmp_path / "kit2",
        "--return", owners / "a" / "return", "--out", tmp_path / "tuned3"
    )  # fmt: skip


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
        ("ab", ("--weights", "1"), "--weights has 1 numbers for 2 returns: give one for each of several returns"),
        ("ab", ("--weights", "1,0"), "--weights holds 0.0, but each must be a finite number above 0"),
        ("ab", ("--weights", "1,x"), "--weights must be"),
        ("ab", ("--merge", "trimmed"), "--merge trimmed needs 3 returns or more"),
        ("ab", ("--merge", "median"), "--merge must be one of mean, trimmed, not 'median'"),
        ("ab", ("--clip-norm", "2"), "--clip-norm needs 3 returns or more"),
        ("abc", ("--clip-norm", "0"), "--clip-norm is 0.0"),
        ("a", ("--weights", "1"), "give one for each of several returns"),
        ("aa", (), f"the returns {owners}/a/return and {owners}/a/return are the same: give it once"),
        (["a", tmp_path / "copy"], (), "are the same: give it once"),
        (
            ["a", "full"],
            (),
            f"return {owners}/a/return holds LoRA's factors and return {owners}/full/return whole layers",
        ),
        ("abc", ("--max-update", "1e-9"), f"return {owners}/a/return: adapter.safetensors of the return: "),
        (["a", "none"], (), f"return {owners}/none/return: the folder cannot be read"),
    ]:
        assert said in error_of(capsys, *words(owners, half, tmp_path / "tuned", *names), *options), options
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_what_a_further_round_refuses(owners, half, tmp_path, capsys):
    siftune(capsys, *words(owners, half, tmp_path / "tuned", "a"))
    usual = {"--model": half, "--from": tmp_path / "tuned", "--kit": owners / "kit", "--out": tmp_path / "kit"}
    for flags, said in [
        ({"--from": None}, "a further round takes both --from, the tuned model, and --kit"),
        ({"--kit": None}, "a further round takes both --from"),
        ({"--calibration": owners / "rows.jsonl"}, "--calibration has no effect with --from"),
        ({"--keep": 0.7}, "--keep has no effect with --from, where all is as in the kit of the round before"),
        ({"--first": 1}, "--first has no effect with --from"),
        ({"--from": half}, "the tuned model is the base itself"),
        ({"--model": tmp_path / "tuned"}, "fingerprint"),
        ({"--kit": tmp_path / "none"}, f"kit {tmp_path}/none"),
        ({"--from": tmp_path / "none"}, "does not exist"),
        ({"--public-key": owners / "rows.jsonl"}, "is no public key"),
    ]:
        pairs = {name: value for name, value in {**usual, **flags}.items() if value is not None}
        assert said in error_of(capsys, "emulate", *(word for pair in pairs.items() for word in pair)), flags
        assert not (tmp_path / "kit").exists()
    rows = ("--calibration", owners / "rows.jsonl", "--out", tmp_path / "kit", "--public-key", owners / "rows.jsonl")
    assert "--public-key has no effect without the kit" in error_of(capsys, "emulate", "--model", half, *rows)
