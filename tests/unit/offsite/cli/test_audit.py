"""`siftune audit` of what only one side has: the owner's calibration rows, the data owner's rows without the base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load, save
from support.commands import error_of, siftune
from support.hostile import forge
from support.kits import edit
from support.tiny_run import save_rows

from siftune.base.errors import DataError, RecipeError
from siftune.offsite.audits.audit import audit_paths
from siftune.offsite.audits.settings import AuditOptions

QUICK = {"steps": 1, "batch_size": 2, "resamples": 50, "template": "none", "recovery": False, "membership": False}


@pytest.fixture
def others(tmp_path):
    path = tmp_path / "others.jsonl"
    rows = [{"prompt": f"{i} less {i // 2}?", "completion": f"{i - i // 2}"} for i in range(40, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(half, parties, others, **changes):
    paths = {"kit": parties / "kit", "train": parties / "rows.jsonl", "eval": others}
    return AuditOptions(**{"model": str(half), **{k: str(v) for k, v in paths.items()}, **QUICK, **changes})


def test_an_owner_s_calibration_rows(half, parties, others):
    calibration = {"calibration": str(parties / "rows.jsonl"), "calibration_others": str(others)}
    found = audit_paths(options(half, parties, others, **calibration)).calibration
    assert (found.attacks["all"].members, found.attacks["all"].others) == (6, 20)
    assert set(found.attacks) == {"attention", "mlp", "all"}
    assert found.blind is not None
    assert audit_paths(options(half, parties, others)).calibration is None


def test_rows_that_follow_are_the_others(half, parties, tmp_path):
    rows = save_rows(tmp_path / "many.jsonl", 11)
    found = audit_paths(options(half, parties, rows, calibration=str(rows))).calibration
    assert (found.attacks["all"].members, found.attacks["all"].others) == (6, 5)
    fewer = save_rows(tmp_path / "fewer.jsonl", 5)
    with pytest.raises(DataError, match="has 5 rows, but the kit was calibrated on 6"):
        audit_paths(options(half, parties, rows, calibration=str(fewer), calibration_others=str(rows)))
    few = save_rows(tmp_path / "few.jsonl", 6)
    with pytest.raises(DataError, match="all of which calibrated the kit"):
        audit_paths(options(half, parties, rows, calibration=str(few)))
    with pytest.raises(DataError, match=r"all 6 other rows of .*few\.jsonl are copies of rows that calibrated the kit"):
        audit_paths(options(half, parties, rows, calibration=str(few), calibration_others=str(few)))


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


def test_a_kit_on_own_texts_has_no_rows(half, parties, others, tmp_path):
    shutil.copytree(parties / "kit", tmp_path / "kit")
    edit(tmp_path / "kit", "manifest.json", lambda m: m["calibration"].update(kind="own texts", seed=0))
    given = {"kit": str(tmp_path / "kit"), "calibration": str(parties / "rows.jsonl")}
    with pytest.raises(RecipeError, match=r"texts .* which the base wrote itself .* leave out --calibration"):
        audit_paths(options(half, parties, others, **given))


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
