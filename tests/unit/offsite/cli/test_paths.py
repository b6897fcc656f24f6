"""Kits and returns in the place of each other."""

import json
from pathlib import Path

import pytest
from support.commands import error_of


def _folders(where):
    for name, kind in (("kit", "kit"), ("run/return", "return")):
        (where / name).mkdir(parents=True)
        files = {f"{number}.safetensors": {"bytes": number} for number in range(2000)}
        content = {"files": files, f"siftune_{kind}": 1}
        (where / name / "manifest.json").write_text(json.dumps(content))
    (where / "run" / "adapter").mkdir()


@pytest.mark.parametrize(
    ("kit", "returned", "message"),
    [
        ("run/return", "kit", "swap them"),
        ("run/return", "run/adapter", "--kit run/return is a return"),
        ("kit", "kit", "--return kit is a kit"),
        ("kit", "run/adapter", "give run/return"),
        ("kit", "run", "give run/return"),
    ],
)
def test_a_kit_in_the_place_of_a_return(tmp_path, monkeypatch, capsys, kit, returned, message):
    monkeypatch.chdir(tmp_path)
    _folders(Path())
    assert message in error_of(capsys, "plug", "--kit", kit, "--return", returned, "--out", "x")
