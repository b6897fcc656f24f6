"""Kits with legal but extreme values: `train` and `plug` work, or refuse in one sentence and leave nothing behind."""

import pytest
import torch
from safetensors.torch import load, save
from support.commands import TRAIN, error_of, siftune
from support.hostile import forge

from siftune.cli.main import main

CONFIG, EMULATOR, OUTER = "config.json", "emulator.safetensors", "adapter.safetensors"
LARGEST = 65280.0  # of bfloat16 within the limit on numbers


def filled(end, value):
    """Every tensor whose name ends so gets this number."""

    def change(data):
        tensors = load(data)
        new = {name: torch.full_like(t, value) if name.endswith(end) else t for name, t in tensors.items()}
        return save(new, {"format": "pt"})

    return change


CASES = [
    (CONFIG, "hidden_act", "relu2", None, None),
    (CONFIG, "attention_dropout", 0.999, None, None),
    (EMULATOR, "", filled("norm.weight", LARGEST), None, None),
    (EMULATOR, "", filled("lm_head.weight", -LARGEST), None, None),
    (OUTER, "", filled("down_proj.weight", LARGEST), None, "down_proj.weight moved by"),
    (OUTER, "", filled("v_proj.weight", 1e-38), None, "v_proj.weight moved by 1 times its norm"),
    (OUTER, "", filled("q_proj.weight", 65504.0), None, "q_proj.weight moved by"),
]


@pytest.mark.parametrize(("name", "path", "value", "at_training", "at_plugging"), CASES)
def test_the_way_of_an_odd_kit(parties, half, tmp_path, capsys, name, path, value, at_training, at_plugging):
    kit, run, tuned = forge(parties / "kit", tmp_path, name, path, value), tmp_path / "run", tmp_path / "tuned"
    train = ("train", "--model", kit, "--train", parties / "rows.jsonl", "--out", run, *TRAIN)
    plug = ("plug", "--model", half, "--kit", kit, "--return", run / "return", "--out", tuned)
    siftune(capsys, "verify", kit)
    if at_training:
        assert at_training in error_of(capsys, *train)
        assert not (run / "return").exists()
        return
    assert main([*map(str, train)]) == 0
    if at_plugging:
        assert at_plugging in error_of(capsys, *plug)
        assert not tuned.exists()
    else:
        siftune(capsys, *plug)
