"""Limits of an owner on returns: the size of an update, and the loss on rows of the owner."""

import math
import re
import shutil

import pytest
from safetensors.torch import load_file
from support.commands import error_of, siftune

from siftune.offsite.exchange.returned import write_return
from siftune.offsite.kit.folder import read_kit


def spoiled(folder, kit, change):
    """Write a return of the kit's own tensors with one change."""
    tensors = load_file(kit / "adapter.safetensors")
    change(tensors)
    shutil.rmtree(folder, ignore_errors=True)
    return write_return(folder, tensors, read_kit(kit))


@pytest.mark.parametrize("options", [(), ("--max-update", "0.3"), ("--max-update", "1.5")])
@pytest.mark.parametrize("name", ["last.0.input_layernorm.weight", "first.0.mlp.up_proj.weight"])
def test_verify_refuses_what_plug_refuses_in_the_same_words(half, damaged, capsys, options, name):
    kit, back, tuned = damaged / "kit", damaged / "back", damaged / "tuned"
    spoiled(back, kit, lambda tensors: tensors[name].zero_())
    checked = ("verify", back, "--kit", kit, *options)
    plugged = ("plug", "--model", half, "--kit", kit, "--return", back, "--out", tuned, *options)
    if options == ("--max-update", "1.5"):
        assert siftune(capsys, *checked)[0]["largest"] == {"tensor": name, "update": 1.0}
        siftune(capsys, *plugged)
    else:
        words = error_of(capsys, *checked)
        assert words.startswith(f"adapter.safetensors of the return: {name} moved by 1 times its norm")
        assert error_of(capsys, *plugged) == words
        assert not tuned.exists()


def test_verify_takes_a_limit_for_returns_alone(parties, damaged, capsys):
    assert "leave out --max-update" in error_of(capsys, "verify", parties / "kit", "--max-update", "0.5")
    way = ("verify", damaged / "return", "--kit", parties / "kit", "--max-update")
    assert "--max-update is 0, but must be a number, above 0" in error_of(capsys, *way, "0")
    assert "must stay below 1e-09" in error_of(capsys, *way, "1e-9")
    assert siftune(capsys, *way, "0.5")[0]["limit"] == 0.5


def test_plug_measures_the_owners_rows_before_and_after(half, damaged, rows, capsys):
    kit, tuned = damaged / "kit", damaged / "tuned"
    usual = ("plug", "--model", half, "--kit", kit, "--out", tuned, "--dtype", "bfloat16")
    usual = (*usual, "--template", "none", "--eval-limit", "6", "--eval")
    better = damaged / "return"  # two steps on rows like these
    found, said = siftune(capsys, *usual, rows, "--return", better)
    loss = found["loss"]
    assert (loss["rows"], loss["limit"]) == (6, 0.0)
    assert loss["after"] < loss["before"]
    assert (
        f"loss on 6 rows of {rows}, in nats per token: {loss['before']:.4f} before, {loss['after']:.4f} after" in said
    )
    for model, value in ((half, loss["before"]), (tuned, loss["after"])):
        measure = (
            "--data",
            rows,
            "--limit",
            "6",
            "--metrics",
            "perplexity",
            "--template",
            "none",
            "--dtype",
            "bfloat16",
        )
        [run] = siftune(capsys, "eval", model, *measure)[0]["runs"]
        assert run["metrics"][0]["base"] == pytest.approx(math.exp(value), rel=1e-6)


def test_plug_refuses_a_model_that_got_worse(half, damaged, rows, capsys):
    kit, back, tuned = damaged / "kit", damaged / "back", damaged / "tuned"
    start, end = (load_file(folder / "adapter.safetensors") for folder in (kit, damaged / "return"))
    spoiled(back, kit, lambda t: [t[n].copy_(start[n] - 20 * (end[n] - start[n])) for n in t])  # the other way
    usual = ("plug", "--model", half, "--kit", kit, "--return", back, "--out", tuned, "--template", "none")
    words = error_of(capsys, *usual, "--eval", rows)
    numbers = re.fullmatch(
        r"the return makes the model worse: on your 24 rows its loss goes from (\S+) to (\S+) nats per token, and may "
        r"rise by 0: refuse the return, or raise --max-loss-increase if you expect this", words
    )  # fmt: skip
    before, after = map(float, numbers.groups())
    assert after > before
    assert not tuned.exists()
    increase = after - before
    assert "may rise by" in error_of(capsys, *usual, "--eval", rows, "--max-loss-increase", f"{0.8 * increase}")
    assert not [path for path in damaged.iterdir() if "tuned" in path.name]
    found, _ = siftune(capsys, *usual, "--eval", rows, "--max-loss-increase", f"{1.2 * increase}")
    assert found["loss"]["after"] - found["loss"]["before"] == pytest.approx(increase, abs=2e-4)


def test_a_return_that_changes_nothing_is_no_worse(half, damaged, rows, capsys):
    spoiled(damaged / "back", damaged / "kit", lambda tensors: None)
    arguments = ("--model", half, "--kit", damaged / "kit", "--return", damaged / "back", "--out", damaged / "tuned")
    found, _ = siftune(capsys, "plug", *arguments, "--eval", rows, "--template", "none")
    assert found["loss"]["after"] == found["loss"]["before"]
