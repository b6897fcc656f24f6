"""The commands of a kit from `siftune emulate` to `audit`: its whole way, and what each says to what it cannot use."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import EMULATE, TRAIN, error_of, siftune
from support.kits import tensor_specs
from support.tiny_run import save_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.cli.main import main
from siftune.offsite.kit.folder import read_kit
from siftune.offsite.kit.tensors import TensorFile

# --- the whole way ---


def test_from_the_model_to_the_tuned_model(half, rows, tmp_path, capsys):
    kit, run, tuned = tmp_path / "kit", tmp_path / "run", tmp_path / "tuned"
    made, said = siftune(capsys, "emulate", "--model", half, "--calibration", rows, "--out", kit, *EMULATE)
    for words in (
        "1 of 3: calibration: 0 of ",
        "3 of 3: compression: 0 of ",
        f"kit in {kit}",
        "siftune verify KIT",
        "siftune plug",
    ):
        assert words in said
    checked, said = siftune(capsys, "verify", kit)
    assert "is sound" in said
    assert checked == {key: value for key, value in made.items() if key != "seconds"}

    siftune(capsys, "train", "--model", kit, "--train", rows, "--out", run, *TRAIN)
    found, said = siftune(capsys, "verify", run / "return", "--kit", kit)
    assert found["digest"] == made["digest"]
    assert "first.0" in said

    plugged, said = siftune(capsys, "plug", "--model", half, "--kit", kit, "--return", run / "return", "--out", tuned)
    assert (plugged["model"], plugged["dtype"]) == (str(tuned), "bfloat16")
    assert 0 < plugged["largest"]["update"] < plugged["limit"] == 0.25
    assert {name: plugged[name] for name in found.keys() & plugged.keys() - {"kit"}} == {
        name: value for name, value in found.items() if name not in ("kit", "digest")
    }
    assert plugged["loss"] is None
    assert {"first.0", "last.0"} == set(plugged["layers"])
    assert "‖W' − W‖ / ‖W‖" in said

    before = AutoModelForCausalLM.from_pretrained(half, dtype="auto").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tuned, dtype="auto").state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed
    assert all(name.startswith(("model.layers.0.", "model.layers.3.")) for name in changed)
    assert AutoTokenizer.from_pretrained(tuned)("1 and 2?").input_ids == (
        AutoTokenizer.from_pretrained(half)("1 and 2?").input_ids
    )
    assert main(["eval", str(tuned), "--data", str(rows), "--limit", "4", "--metrics", "perplexity"]) == 0


def test_audit_of_a_return(half, parties, tmp_path, capsys):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "5 less 3?", "completion": "2"}) + "\n")
    found, said = siftune(
        capsys, "audit", "--model", half, "--kit", parties / "kit", "--train", parties / "rows.jsonl",
        "--eval", held_out, "--return", parties / "run" / "return", "--out", tmp_path / "audit", "--steps", "1",
        "--batch-size", "2", "--resamples", "50", "--template", "none", "--no-recovery",
    )  # fmt: skip
    assert {"full_zs", "full_ft", "emulator_zs", "emulator_ft", "plug_in"} <= set(found["conditions"])
    assert "Plug-in" in said
    assert f"audit in {tmp_path}/audit" in said
    names = {path.name for path in (tmp_path / "audit").iterdir()}
    assert names == {"audit.json", "audit.md"}


# --- emulate ---


def test_what_a_kit_is_said_to_be(parties, capsys):
    kit = read_kit(parties / "kit")
    found, _ = siftune(capsys, "verify", kit.path)
    frozen, adapter = (load_file(kit.path / f"{name}.safetensors") for name in ("emulator", "adapter"))
    middle = sum(t.numel() for name, t in frozen.items() if name.startswith(("model.layers.1.", "model.layers.2.")))
    layer = sum(t.numel() for name, t in adapter.items() if name.startswith("first.0."))
    whole = sum(t.numel() for t in frozen.values()) - middle + 4 * layer
    assert found["middle"] == {"layers": 2, "of": 2, "kept": middle / (2 * layer)}
    assert found["base_mb"] == pytest.approx(2 * whole / 1e6)
    assert found["emulator_mb"] == (kit.path / "emulator.safetensors").stat().st_size / 1e6
    assert found["outer_mb"] == (kit.path / "adapter.safetensors").stat().st_size / 1e6
    assert (found["model_type"], found["layers"], found["split"]) == ("llama", 4, {"first": 1, "last": 1})
    assert (found["dtype"], found["outer"]) == ("bfloat16", {"tensors": len(adapter), "dtype": "float32"})
    assert found["digest"] == kit.digest


def test_dropped_layers_do_not_count(half, rows, tmp_path, capsys):
    arguments = ("--model", half, "--calibration", rows, "--out", tmp_path / "kit", "--keep", "0.5")
    found, _ = siftune(capsys, "emulate", *arguments, "--method", "layerdrop", *EMULATE)
    assert found["middle"] == {"layers": 1, "of": 2, "kept": 0.5}


def test_options_reach_the_kit(half, rows, tmp_path, capsys):
    arguments = ("--model", half, "--calibration", rows, "--rows", "6", "--template", "none")
    sized, _ = siftune(capsys, "emulate", *arguments, "--out", tmp_path / "sized", "--first", "1", "--last", "2")
    assert sized["split"] == {"first": 1, "last": 2}
    typed, _ = siftune(
        capsys, "emulate", *arguments, "--out", tmp_path / "typed", "--first", "1", "--last", "1",
        "--kit-dtype", "float32", "--outer-dtype", "bfloat16", "--dtype", "float32",
    )  # fmt: skip
    assert (typed["dtype"], typed["outer"]["dtype"]) == ("float32", "bfloat16")
    computed, _ = siftune(
        capsys, "emulate", *arguments, "--out", tmp_path / "computed", "--first", "1", "--last", "1",
        "--dtype", "float32",
    )  # fmt: skip
    assert computed["dtype"] == "bfloat16"  # the checkpoint's, though it was computed in float32
    other = {name: (tmp_path / name / "emulator.safetensors").read_bytes() for name in ("typed", "computed")}
    assert len(other["typed"]) > 1.8 * len(other["computed"])
    assert {spec.dtype for spec in tensor_specs(tmp_path / "computed" / "emulator.safetensors").values()} == {"BF16"}


@pytest.mark.parametrize(
    ("flags", "differs"),
    [
        ((), False),
        (("--basis", "svd"), True),
        (("--lambda-attn", "5"), True),
        (("--lambda-mlp", "5"), True),
        (("--method", "layerdrop"), True),
        (("--allot", "uniform"), True),
        (("--keep", "0.5"), True),
        (("--max-length", "3"), True),
        (("--rows", "3"), True),
        (("--completion-only",), True),
    ],
)
def test_every_setting_changes_the_kit(half, parties, rows, tmp_path, capsys, flags, differs):
    arguments = ("--model", half, "--calibration", rows, "--out", tmp_path / "kit", *EMULATE)
    found, _ = siftune(capsys, "emulate", *arguments, *flags)
    assert (found["digest"] != read_kit(parties / "kit").digest) == differs


@pytest.fixture
def own(half, rows, tmp_path, monkeypatch, capsys):
    """Make a kit calibrated on own texts, with an empty cache each."""

    def emulate(name, *flags):
        monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / f"cache of {name}"))
        arguments = ("--model", half, "--out", tmp_path / name, *EMULATE, "--max-length", "20")
        prompts = () if "--calibration-prompts" in flags else ("--calibration-prompts", rows)
        return siftune(capsys, "emulate", *arguments, *prompts, *flags)

    return emulate


def test_a_kit_of_own_texts(own, rows, tmp_path, capsys):
    made, said = own("one", "--seed", "7")
    stages = ("sampling texts", "scoring texts", "calibration", "costs", "compression")
    lines = [f"{number} of 5: {stage}: 0 of " for number, stage in enumerate(stages, 1)]
    assert [line for line in lines if f"\n{line}" in said] == lines
    assert "with which prompts the calibration texts of a kit begin: give --calibration-prompts" in said
    assert made["calibration"] == {"kind": "own texts", "number": 6, "tokens": 20, "seed": 7}
    assert own("again", "--seed", "7")[0]["digest"] == made["digest"]
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "one")]) == 0
    assert "6 texts of at most 20 tokens, which the base wrote itself after prompts; seed 7" in capsys.readouterr().out
    others = {
        "seed": (),
        "prompts": ("--calibration-prompts", save_rows(tmp_path / "others.jsonl", 3), "--seed", "7"),
        "completions": ("--seed", "7", "--completion-only"),
    }
    for name, flags in others.items():
        own(name, *flags)
    assert own("named", "--calibration", "own", "--seed", "7")[0]["digest"] == made["digest"]
    frozen = {(tmp_path / name / "emulator.safetensors").read_bytes() for name in ("one", *others)}
    assert len(frozen) == 4


def test_own_texts_if_nothing_else_is_given(half, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "x" * 5, "completion": "y" * n} for n in (3, 7, 4, 30)]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    flags = ("--first", 1, "--last", 1, "--template", "none", "--method", "layerdrop")
    arguments = ("--model", half, "--calibration-prompts", prompts, "--out", tmp_path / "kit", *flags)
    made, _ = siftune(capsys, "emulate", *arguments)
    # three of four rows have at most 13 tokens, with the end token
    assert made["calibration"] == {"kind": "own texts", "number": 1024, "tokens": 13, "seed": 0}


def test_rows_are_what_a_manifest_says(parties):
    assert str(read_kit(parties / "kit").manifest.calibration) == "6 rows of at most 12 tokens"


def test_what_emulate_refuses(half, rows, tmp_path, capsys, parties, monkeypatch):
    monkeypatch.setattr("siftune.offsite.exchange.own_texts.sample_texts", None)  # minutes, for a large model
    few = save_rows(tmp_path / "few.jsonl", 6)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "x" * 700}) + "\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    usual = {"--model": half, "--calibration": rows, "--out": tmp_path / "kit", "--first": 1, "--last": 1}
    for flags, words in [
        ({"--model": tmp_path / "none"}, f"{tmp_path}/none"),
        ({"--model": parties / "kit"}, f"{parties}/kit"),
        ({"--calibration": tmp_path / "none.jsonl"}, "none.jsonl"),
        ({"--out": tmp_path / "used"}, f"{tmp_path}/used"),
        ({"--out": few}, f"{few}"),
        ({"--calibration-prompts": rows}, "--calibration-prompts is for own texts, but --calibration names rows"),
        ({"--seed": 3}, "--seed is for own texts"),
        ({"--calibration": "own"}, "give public rows like those of the tuning with --calibration-prompts FILE"),
        ({"--calibration": "own", "--calibration-prompts": tmp_path / "none.jsonl"}, "none.jsonl does not exist"),
        (
            {"--calibration": "own", "--calibration-prompts": rows, "--max-length": 5},
            "--max-length 5 leaves fewer than 4 tokens after every prompt",
        ),
        ({"--keep": 0}, "--keep"),
        ({"--lambda-mlp": -1}, "--lambda-mlp"),
        ({"--method": "layerdrop", "--lambda-attn": 1}, "method layerdrop drops whole layers"),
        ({"--keep": 0.05}, "keep is 0.05, but allot measured leaves 0.1 of every matrix or more: use allot uniform"),
        ({"--first": 3}, "the model has 4 layers"),
        ({"--calibration": "own", "--calibration-prompts": rows, "--first": 3}, "the model has 4 layers"),
        ({"--max-length": 600, "--calibration": long}, "a row takes 600 tokens, but the model's window is 512"),
        (
            {"--calibration": "own", "--calibration-prompts": rows, "--max-length": 600},
            "an own text takes 600 tokens, but the model's window is 512",
        ),
        ({"--rows": 0}, "--rows is 0"),
        ({"--max-length": 1}, "--max-length is 1"),
        ({"--sweep": None, "--keep": 0.5}, "unknown option --sweep of `siftune emulate`"),
        ({"--lambda-atn": 1}, "unknown option --lambda-atn of `siftune emulate`; did you mean --lambda-attn?"),
        ({"--method": "magic"}, "--method is magic"),
    ]:
        arguments = [str(word) for pair in {**usual, **flags}.items() for word in pair if word is not None]
        assert words in error_of(capsys, "emulate", *arguments), flags
        assert sorted(path.name for path in tmp_path.iterdir()) == before, flags
    assert error_of(capsys, "emulate", "--model", half, "--calibration", rows).startswith("--out must be given")
    said = error_of(capsys, "emulate", "--model", half, "--out", tmp_path / "kit")
    assert said.endswith("or rows to calibrate on with --calibration FILE")


# --- verify ---


def test_what_verify_refuses(damaged, parties, half, capsys):
    kit, back = damaged / "kit", damaged / "return"
    assert error_of(capsys, "verify", back) == f"{back} is no kit; if it is a return, name its kit with --kit"
    assert error_of(capsys, "verify", damaged / "none").startswith(f"there is no folder {damaged}/none")
    assert error_of(capsys, "verify", kit, "--kit", kit).startswith(f"{kit} is a kit itself")
    assert error_of(capsys, "verify", half).startswith(f"{half} is no kit")
    assert error_of(capsys, "verify").endswith("see `siftune verify --help`")
    with (kit / "emulator.safetensors").open("r+b") as file:
        file.seek(-2, 2)  # the last number's lower half
        file.write(b"\x55")
    assert "emulator.safetensors has the SHA-256" in error_of(capsys, "verify", kit)
    assert "emulator.safetensors has the SHA-256" in error_of(capsys, "verify", back, "--kit", kit)
    (back / "notes.txt").write_text("")
    assert "notes.txt" in error_of(capsys, "verify", back, "--kit", parties / "kit")


# --- plug ---


def test_what_plug_refuses(damaged, parties, half, base, capsys):
    usual = {"--model": half, "--kit": damaged / "kit", "--return": damaged / "return", "--out": damaged / "tuned"}
    other = damaged / "other"
    model = AutoModelForCausalLM.from_pretrained(half, dtype="auto")
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(half).save_pretrained(other)
    before = sorted(path.name for path in damaged.iterdir())
    for flags, words in [
        ({"--model": other}, "fingerprint"),
        ({"--model": damaged / "none"}, "does not exist"),
        ({"--kit": damaged / "return"}, f"kit {damaged}/return"),
        ({"--return": damaged / "kit"}, f"return {damaged}/kit"),
        ({"--max-update": 1e-9}, "--max-update"),
        ({"--max-update": 0}, "--max-update is 0"),
        ({"--max-update": "nan"}, "--max-update is nan"),
        ({"--max-loss-increase": 0.1}, "--max-loss-increase has no effect without rows to measure on: add --eval FILE"),
        ({"--eval-limit": 3}, "--eval-limit has no effect without rows"),
        ({"--eval": parties / "rows.jsonl", "--max-loss-increase": -0.1}, "--max-loss-increase is -0.1"),
        ({"--eval": parties / "rows.jsonl", "--max-loss-increase": "nan"}, "--max-loss-increase is nan"),
        ({"--eval": parties / "rows.jsonl", "--max-loss-increase": "little"}, "--max-loss-increase is "),
        ({"--eval": parties / "rows.jsonl", "--eval-limit": 0}, "--eval-limit is 0"),
        ({"--eval": damaged / "none.jsonl"}, "none.jsonl does not exist"),
        ({"--out": damaged / "kit"}, "is not empty"),
        ({"--retrun": "x"}, "unknown option --retrun of `siftune plug`; did you mean --return?"),
        ({"--dtype": "int8"}, "--dtype is int8"),
    ]:
        arguments = [word for pair in {**usual, **flags}.items() for word in pair]
        assert words in error_of(capsys, "plug", *arguments), flags
        assert sorted(path.name for path in damaged.iterdir()) == before, flags
    arguments = [word for pair in list(usual.items())[:2] for word in pair]
    assert error_of(capsys, "plug", *arguments) == "--return and --out must be given; see `siftune plug --help`"
    words = error_of(capsys, "plug", *arguments, "--out", damaged / "tuned")
    assert "--return" in words
    tensors = load_file(damaged / "return" / "adapter.safetensors")
    tensors.pop("first.0.mlp.up_proj.weight")
    save_file(tensors, damaged / "return" / "adapter.safetensors", {"format": "pt"})
    assert "adapter.safetensors" in error_of(capsys, "plug", *(word for pair in usual.items() for word in pair))


# --- audit ---


def test_what_audit_refuses(damaged, parties, half, capsys):
    usual = {
        "--model": half, "--kit": parties / "kit", "--train": parties / "rows.jsonl", "--eval": parties / "rows.jsonl"
    }  # fmt: skip
    for flags, words in [
        ({"--kit": damaged / "none"}, f"{damaged}/none"),
        ({"--return": parties / "kit"}, f"return {parties}/kit"),
        ({"--train": damaged / "none.jsonl"}, "none.jsonl does not exist"),
        ({"--steps": 0}, "--steps is 0"),
        ({"--retrun": "x"}, "did you mean --return?"),
        ({"--out": parties / "rows.jsonl"}, "cannot be written to"),
    ]:
        arguments = [word for pair in {**usual, **flags}.items() for word in pair]
        assert words in error_of(capsys, "audit", *arguments), flags
    assert "no kit given" in error_of(capsys, "audit", "--model", half)


# --- what is read how often ---


@pytest.mark.parametrize("command", ["train", "eval", "eval of two", "audit", "plug", "verify", "verify of a return"])
def test_a_kit_is_checked_once(parties, half, tmp_path, capsys, monkeypatch, command):
    def counted(file):
        checked.append(file._name)
        return check(file)

    checked, check = [], TensorFile.check_numbers
    monkeypatch.setattr(TensorFile, "check_numbers", counted)
    kit, run, rows = (str(parties / name) for name in ("kit", "run", "rows.jsonl"))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "5 less 3?", "completion": "2"}) + "\n")
    measure = ["--data", rows, "--limit", "4", "--metrics", "perplexity"]
    audit = ["--kit", kit, "--train", rows, "--eval", held_out, "--return", f"{run}/return", "--resamples", "50"]
    words = {
        "train": ["train", "--model", kit, "--train", rows, "--out", tmp_path / "run", *TRAIN],
        "eval": ["eval", run, *measure],
        "eval of two": ["eval", run, kit, *measure],
        "audit": ["audit", "--model", half, *audit, "--steps", "1", "--batch-size", "2", "--no-recovery"],
        "plug": ["plug", "--model", half, "--kit", kit, "--return", f"{run}/return", "--out", tmp_path / "tuned"],
        "verify": ["verify", kit],
        "verify of a return": ["verify", f"{run}/return", "--kit", kit],
    }
    siftune(capsys, *words[command])
    assert checked.count("emulator.safetensors") == 1


# --- help ---


@pytest.mark.parametrize("command", ["emulate", "verify", "plug", "audit"])
def test_help_shows_every_option_and_needs_no_torch(command):
    code = (
        f"import sys; from siftune.cli.main import main; code = main(['{command}', '--help']);"
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = re.findall(r"--[a-z-]+", done.stdout)
    shown = {
        "emulate": "--lambda-attn",
        "verify": "--kit",
        "plug": "--return",
        "audit": "--return",
    }[command]
    assert shown in options
    assert "--returned" not in options
