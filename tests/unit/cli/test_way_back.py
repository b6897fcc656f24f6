"""Runs on a kit: resumed and measured on no other kit, whose files are opened as often as needed."""

import shutil

import pytest
from support.commands import EMULATE, TRAIN, error_of, siftune
from support.kits import edit, read_json
from support.tiny_run import save_rows

from siftune.cli.main import main
from siftune.offsite.kit.folder import read_kit


@pytest.fixture(scope="module")
def parties(half, tmp_path_factory):
    """Rows, a kit, and runs on it."""
    place = tmp_path_factory.mktemp("parties")
    rows = save_rows(place / "rows.jsonl")
    way = ["--model", half, "--calibration", rows, "--out", place / "kit", *EMULATE]
    assert main(["emulate", *map(str, way)]) == 0
    for name, options in (("full", TRAIN), ("lora", (*TRAIN[:4], *TRAIN[6:], "--adapter", "lora", "--rank", "2"))):
        way = ["--model", place / "kit", "--train", rows, "--out", place / name, *options]
        assert main(["train", *map(str, way)]) == 0
    return place


def copied(parties, place):
    """A copy to change, with recipes that name its own kit and rows."""
    shutil.copytree(parties, place)
    for recipe in place.glob("*/recipe.yaml"):
        recipe.write_text(recipe.read_text().replace(str(parties), str(place)))
    return place


def snapshot(run):
    """Contents of all files of a run."""
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def forged(kit):
    """Other contents, and the manifest in line with them."""
    edit(kit, "config.json", lambda config: config.update(rms_norm_eps=2e-5))


def test_a_run_does_not_resume_on_another_kit(parties, tmp_path, capsys):
    """The checkpoint says of which kit it is."""
    place = copied(parties, tmp_path / "place")
    before = snapshot(place / "full")
    forged(place / "kit")
    refusal = error_of(capsys, "train", "--resume", place / "full", "--steps", "3")
    assert f"is of a run on the kit {read_kit(parties / 'kit').digest[:12]}" in refusal
    assert f"is now the kit {read_kit(place / 'kit').digest[:12]}" in refusal
    assert snapshot(place / "full") == before


@pytest.mark.parametrize("run", ["full", "lora", "lora/adapter"])
def test_a_run_is_not_measured_on_another_kit(parties, tmp_path, capsys, run):
    place = copied(parties, tmp_path / "place")
    measure = ("--data", place / "rows.jsonl", "--limit", "2", "--metrics", "perplexity", "--base", place / "kit")
    siftune(capsys, "eval", place / run, *measure)
    forged(place / "kit")
    assert "it was made for another kit" in error_of(capsys, "eval", place / run, *measure)


@pytest.mark.parametrize(("run", "words"), [("full", "is no kit"), ("lora", "is none"), ("lora/adapter", "is none")])
def test_a_run_on_a_kit_is_not_measured_on_an_ordinary_model(parties, half, capsys, run, words):
    """The kit may have fewer layers, and its last ones other numbers."""
    measure = ("--data", parties / "rows.jsonl", "--limit", "2", "--metrics", "perplexity", "--base", half)
    assert f"but {half} {words}" in error_of(capsys, "eval", parties / run, *measure)


def test_a_run_resumes_on_its_kit(parties, tmp_path, capsys):
    place = copied(parties, tmp_path / "place")
    assert siftune(capsys, "train", "--resume", place / "full", "--steps", "3")[0]["steps"] == 3
    assert read_json(place / "full" / "run.json")["source"] == {"kit": read_kit(parties / "kit").digest}
