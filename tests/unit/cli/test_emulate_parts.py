"""`siftune emulate` of attention or the MLPs alone: DRD and SCP by themselves."""

import pytest
import torch
from safetensors.torch import load_file
from support.commands import EMULATE, error_of, siftune
from transformers import AutoModelForCausalLM

from siftune.offsite.exchange.load import load_emulator


@pytest.mark.parametrize(("part", "whole"), [("--keep-mlp", "self_attn"), ("--keep-attn", "mlp")])
def test_one_part_is_the_base_s(half, rows, tmp_path, capsys, part, whole):
    other = "--keep-attn" if part == "--keep-mlp" else "--keep-mlp"
    arguments = ("--model", half, "--calibration", rows, "--out", tmp_path / "kit", part, "0.5", other, "1")
    _, said = siftune(capsys, "emulate", *arguments, *EMULATE)
    assert "whoever has the base model can tell which rows calibrated a kit" in said
    siftune(capsys, "verify", tmp_path / "kit")
    base = AutoModelForCausalLM.from_pretrained(half, dtype="auto").state_dict()
    kit = load_file(tmp_path / "kit" / "emulator.safetensors")
    middle = {name: tensor for name, tensor in kit.items() if ".layers." in name and f".{whole}." in name}
    assert middle
    assert all(torch.equal(tensor, base[name]) for name, tensor in middle.items())
    assert load_emulator(tmp_path / "kit")(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_file_size_leaves_no_room_for_parts(half, rows, tmp_path, capsys):
    arguments = ("--model", half, "--calibration", rows, "--out", tmp_path / "kit", "--size-mb", "0.05")
    assert "leave out --keep-attn and --keep-mlp" in error_of(capsys, "emulate", *arguments, "--keep-mlp", "0.5")
