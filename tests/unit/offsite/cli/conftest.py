"""A kit of a tiny model, and a run on the kit."""

import shutil

import pytest
from support.commands import EMULATE, TRAIN
from support.tiny_run import save_rows

from siftune.cli.main import main


@pytest.fixture(scope="module")
def parties(half, tmp_path_factory):
    """A folder with the owner's kit and what a data owner's training left behind: kit, run."""
    place = tmp_path_factory.mktemp("parties")
    rows = save_rows(place / "rows.jsonl")
    assert main(["emulate", "--model", str(half), "--calibration", str(rows), "--out", f"{place}/kit", *EMULATE]) == 0
    train = ["train", "--model", f"{place}/kit", "--train", str(rows), "--out", f"{place}/run", *TRAIN]
    assert main(train) == 0
    return place


@pytest.fixture
def damaged(parties, tmp_path):
    """A copy of kit and return to spoil."""
    shutil.copytree(parties / "kit", tmp_path / "kit")
    shutil.copytree(parties / "run" / "return", tmp_path / "return")
    return tmp_path
