"""`siftune audit` of a kit whose losses are not finite, and of a return without the base."""

import json

import pytest
import torch
from safetensors.torch import load, save
from support.commands import error_of, siftune
from support.hostile import forge


@pytest.fixture
def others(tmp_path):
    path = tmp_path / "others.jsonl"
    rows = [{"prompt": f"{i} less {i // 2}?", "completion": f"{i - i // 2}"} for i in range(40, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_losses_that_are_not_finite_are_one_sentence(half, parties, others, tmp_path, capsys):
    def largest(data):  # of bfloat16 within the limit on numbers
        norms = {name: tensor for name, tensor in load(data).items() if name.endswith("norm.weight")}
        return save(
            {**load(data), **{name: torch.full_like(norm, 65280.0) for name, norm in norms.items()}}, {"format": "pt"}
        )

    kit = forge(parties / "kit", tmp_path, "emulator.safetensors", "", largest)
    paths = ["--model", half, "--kit", kit, "--train", parties / "rows.jsonl", "--eval", others]
    found = error_of(capsys, "audit", *paths, "--steps", "1", "--template", "none", "--dtype", "float16")
    assert "not finite" in found


def test_a_data_owner_s_audit(parties, others, tmp_path, capsys):
    arguments = ("--kit", parties / "kit", "--return", parties / "run" / "return", "--train", parties / "rows.jsonl")
    more = ("--eval", others, "--template", "none", "--resamples", "50", "--out", tmp_path / "audit")
    found, said = siftune(capsys, "audit", *arguments, *more)
    assert {path.name for path in (tmp_path / "audit").iterdir()} == {"audit.json", "audit.md"}
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == found
    assert found["membership"]["others"] == 20
    for words in ("Leakage of training rows", "blind: the emulator's loss alone", "The emulator stands in"):
        assert words in said
    assert "neither model nor return" in error_of(capsys, "audit", *arguments[:2], *arguments[4:], "--eval", others)
