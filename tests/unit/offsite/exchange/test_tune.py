"""The data owner's side: a kit is tuned, and what goes back to the owner is exactly the tuned outer layers."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from support.emulators import made_kit
from support.kits import edit, read_json
from support.seen import assert_same
from support.tiny_kit import OUTER, SPLIT, base_model, save_kit
from support.tiny_run import choices_of, recipe, save_rows
from support.tokenizer import byte_tokenizer
from support.trainers import At, stop

from siftune.base.errors import KitError, LayerError, RecipeError
from siftune.cli.demo_rows import arithmetic_rows
from siftune.cli.main import main
from siftune.cli.sources import source_of
from siftune.models.adapters.attach import attach_adapter
from siftune.models.layers import find_layers
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange import load as load_module
from siftune.offsite.exchange import tune as module
from siftune.offsite.exchange.emulate import KitOptions
from siftune.offsite.exchange.load import load_emulator
from siftune.offsite.exchange.returned import open_return, read_return, write_return
from siftune.offsite.exchange.tune import merged_layers, save_return
from siftune.offsite.kit.folder import read_kit
from siftune.offsite.kit.manifest import canonical
from siftune.recipe.read import load_recipe
from siftune.train import run as training
from siftune.train.dry_run import dry_run
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)
IDS = torch.tensor([[5, 80, 91, 17, 200, 44]])
PRIVATE = ("manifest.json", "adapter.safetensors")


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return save_kit(tmp_path_factory.mktemp("kits") / "kit")


@pytest.fixture(scope="module")
def half_kit(tmp_path_factory):
    return save_kit(tmp_path_factory.mktemp("kits") / "half", torch.bfloat16)


def train(given, console=QUIET):
    """Train as the command line does."""
    return training.train(given, console, source_of)


def promise_of(folder, kit):
    with open_return(folder, kit) as found:
        return found.privacy


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def with_return(kit, folder, dtype="auto"):
    """The emulator with a return's tensors in it."""
    model = load_emulator(kit.path, dtype)
    names = outer_names(model, SPLIT)
    tensors = {names[name]: tensor for name, tensor in read_return(folder, kit).items()}
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    return model


def shipped(kit):
    return load_file(kit.path / "adapter.safetensors")


# --- what is trained and what goes back


@pytest.mark.parametrize(
    ("method", "adapter"),
    [("dense", "lora"), ("gast", "dora"), ("ist+gast", "full")],
)
def test_the_return_is_what_was_tuned(kit, rows, tmp_path, method, adapter):
    settings = {
        "method": method,
        "adapter": adapter,
        "steps": 4,
        "warmup": 0,
        "lr": 0.02,
        "eval": str(rows),
        **({"active": 1.0} if "ist" in method else {}),
    }
    done = train(recipe(kit.path, rows, tmp_path / "run", **settings), QUIET)
    returned = tmp_path / "run" / "return"
    assert sorted(path.name for path in returned.iterdir()) == sorted(PRIVATE)
    # what the owner will get computes what was trained here
    torch.testing.assert_close(logits(with_return(kit, returned)), logits(done.model), rtol=1e-4, atol=1e-4)
    assert float((logits(load_emulator(kit.path)) - logits(done.model)).abs().max()) > 1e-2
    before, after = shipped(kit), read_return(returned, kit)
    trained = {name for name in before if "norm" not in name or adapter == "full"}
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == trained
    assert load_recipe(tmp_path / "run" / "recipe.yaml").layers == OUTER
    assert (tmp_path / "run" / "adapter").exists() == (adapter != "full")
    assert done.summary["eval_loss"] > 0


def test_adapters_sit_in_the_outer_layers_and_nothing_else_moves(kit, rows, tmp_path):
    done = train(recipe(kit.path, rows, tmp_path / "run", adapter="dora", steps=2, method="rst"), QUIET)
    numbers = {
        int(name.split(".layers.")[1].split(".")[0]) for name, p in done.model.named_parameters() if "lora" in name
    }
    assert numbers == set(OUTER)
    before = load_emulator(kit.path).state_dict()
    own = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in done.model.state_dict().items()
        if "lora" not in name
    }
    assert_same(own, before)  # merging for the return has left no trace either
    config = json.loads((done.folder.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(kit.path)


def test_a_kit_of_half_precision(half_kit, rows, tmp_path):
    """The return has the kit's dtype, however the emulator was loaded."""
    for name, settings in {
        "full": {"dtype": "bfloat16", "adapter": "full"}, "lora": {"dtype": "float32"},
    }.items():  # fmt: skip
        done = train(recipe(half_kit.path, rows, tmp_path / name, steps=2, method="dense", **settings), QUIET)
        returned = read_return(tmp_path / name / "return", half_kit)
        assert {value.dtype for value in returned.values()} == {torch.bfloat16}
        if name == "full":
            state, names = done.model.state_dict(), outer_names(done.model, SPLIT)
            assert_same(returned, {neutral: state[full] for neutral, full in names.items()})


@pytest.fixture(scope="module")
def mixed_kit(tmp_path_factory):
    """A kit whose frozen part is in bfloat16, and whose outer layers have more digits."""
    return made_kit(base_model(), tmp_path_factory.mktemp("kits") / "mixed", KitOptions(torch.bfloat16))


@pytest.mark.parametrize("shape", [{"adapter": "full"}, {"adapter": "dora"}, {"rank": 64}], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_outer_layers_are_not_rounded_to_the_frozen_part_s_dtype(mixed_kit, rows, tmp_path, monkeypatch, shape, dtype):
    monkeypatch.setattr(load_module, "usable_dtype", lambda dtype, _: dtype)  # as where bfloat16 is fast
    given = {"method": "dense", "steps": 2, "lr": 1e-5, "layers": (0,), **shape}
    train(recipe(mixed_kit.path, rows, tmp_path / "run", dtype=dtype, **given), QUIET)
    before, after = shipped(mixed_kit), read_return(tmp_path / "run" / "return", mixed_kit)
    assert {tensor.dtype for tensor in (*before.values(), *after.values())} == {torch.float32}
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved
    assert all(name.startswith("first.0.") for name in moved)
    largest = 1e-3 if "dora" in shape.values() else 1e-4  # PEFT rounds DoRA's magnitudes to the base's dtype
    for name in moved:
        change = (after[name].double() - before[name].double()).abs()
        assert float((change > 0).double().mean()) > 0.9  # rounding would leave most numbers as they were
        assert float(change.max()) < largest


def test_some_of_the_outer_layers(kit, rows, tmp_path):
    train(recipe(kit.path, rows, tmp_path / "run", steps=2, method="dense", adapter="full", layers=(-1,)), QUIET)
    before, after = shipped(kit), read_return(tmp_path / "run" / "return", kit)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if name.startswith("last.0.")}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_merging_is_what_peft_does(family, adapter):
    """In float64: the layers of the model that PEFT merges and unloads."""
    model = attach_adapter(base_model(torch.float64, family), adapter, rank=3, layers=(0, 1, 5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    state = copy.deepcopy(model.state_dict())
    found = merged_layers(model, SPLIT)
    assert_same(model.state_dict(), state)
    plain = copy.deepcopy(model).merge_and_unload()
    wanted = {neutral: plain.state_dict()[name] for neutral, name in outer_names(plain, SPLIT).items()}
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_merging_keeps_what_half_precision_would_lose():
    model = base_model(torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = attach_adapter(model, rank=1, alpha=1, targets=["q_proj"], layers=(0,))
    part = find_layers(model).layers[0].self_attn.q_proj
    with torch.no_grad():
        part.lora_A["default"].weight.fill_(2.0**-6)
        part.lora_B["default"].weight.fill_(2.0**-8)
    found = merged_layers(model, SPLIT)["first.0.self_attn.q_proj.weight"]
    assert torch.equal(found, weight.float() + 2.0**-14)
    assert found.dtype == torch.float32


# --- an adapter that was trained before


def earlier(kit, folder, **settings):
    """An adapter on the emulator of a kit, as another tool saves it."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **settings})
    get_peft_model(load_emulator(kit.path), config).save_pretrained(folder, save_embedding_layers=False)
    return {"method": "dense", "steps": 4, "save_every": 2, "rank": None, "from_adapter": str(folder)}


def test_a_run_on_an_earlier_adapter_continues_by_its_own_recipe(kit, rows, tmp_path):
    given = earlier(kit, tmp_path / "adapter", layers_to_transform=OUTER)
    done = train(recipe(kit.path, rows, tmp_path / "run", **given))
    torch.testing.assert_close(logits(with_return(kit, done.folder.returned)), logits(done.model), rtol=1e-4, atol=1e-4)
    first = str(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    again = replace(load_recipe(tmp_path / "run" / "recipe.yaml"), out=str(tmp_path / "again"), resume=first)
    assert_same(read_return(train(again).folder.returned, kit), read_return(done.folder.returned, kit))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"layers\.2\.self_attn\.q_proj\.lora_A.* would train, but a return holds only .* 0, 1, 3 of the kit"),
        ({"layers_to_transform": OUTER, "modules_to_save": ["embed_tokens"]}, "embed_tokens.* would train"),
        ({"layers_to_transform": OUTER, "modules_to_save": ["input_layernorm"]}, "input_layernorm.* would train"),
        ({"layers_to_transform": OUTER, "init_lora_weights": "pissa"}, "init_lora_weights pissa, but a return"),
        ({"layers_to_transform": OUTER, "init_lora_weights": "olora"}, "init_lora_weights olora, but a return"),
        ({"layers_to_transform": OUTER, "lora_bias": True}, "lora_bias True, but a return"),
        (
            {"layers_to_transform": OUTER, "alora_invocation_tokens": [5]},
            r"alora_invocation_tokens \[5\], but a return",
        ),
    ],
    ids=["middle", "embeddings", "norms", "pissa", "olora", "biases", "alora"],
)
def test_an_earlier_adapter_that_no_return_can_hold_is_refused(kit, rows, tmp_path, settings, words):
    given = earlier(kit, tmp_path / "adapter", **settings)
    for command in (dry_run, training.train):
        with pytest.raises(RecipeError, match=words):
            command(recipe(kit.path, rows, tmp_path / "run", **given), QUIET, source_of)


# --- resuming and stopping


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_stopped_and_resumed(kit, rows, tmp_path, interfere, adapter):
    settings = {"adapter": adapter, "save_every": 2, "steps": 5, "method": "ist", "interval": 2}
    train(recipe(kit.path, rows, tmp_path / "whole", **settings), QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiftTrainer, "__init__", SiftTrainer.__init__)
        interfere(At("on_pre_optimizer_step", 4, stop))
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(recipe(kit.path, rows, tmp_path / "run", **settings), QUIET)
    what, where = ("return", "return") if adapter == "full" else ("adapter", "adapter")
    goes_on = f"`siftune train --resume {tmp_path}/run` continues from step 2"
    assert stopped.value.__notes__ == [f"the {what} after step 3 is in {tmp_path}/run/{where}, and {goes_on}"]
    half = read_return(tmp_path / "run" / "return", kit)
    train(recipe(kit.path, rows, tmp_path / "run", resume=True, **settings), QUIET)
    whole = read_return(tmp_path / "whole" / "return", kit)
    assert_same(read_return(tmp_path / "run" / "return", kit), whole)
    assert any(not torch.equal(value, half[name]) for name, value in whole.items())
    assert choices_of(tmp_path / "run") == choices_of(tmp_path / "whole")


@pytest.mark.parametrize("swap", ["other weights", "an ordinary model"])
def test_a_kit_that_was_swapped_before_a_run_resumes_is_refused(kit, rows, tmp_path, swap):
    place, settings = tmp_path / "kit", {"method": "dense", "save_every": 1}
    shutil.copytree(kit.path, place)
    first = train(recipe(place, rows, tmp_path / "run", steps=1, **settings), QUIET)
    before = {path: path.read_bytes() for path in first.folder.path.rglob("*") if path.is_file()}
    shutil.rmtree(place)
    if swap == "other weights":
        shutil.copytree(kit.path, place)
        edit(place, "config.json", lambda config: config.update(rms_norm_eps=2e-5))
        assert read_kit(place).digest != kit.digest
    else:
        base_model().save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
    with pytest.raises(RecipeError, match="restore the"):
        train(recipe(place, rows, tmp_path / "run", steps=2, resume=True, **settings), QUIET)
    assert {path: path.read_bytes() for path in first.folder.path.rglob("*") if path.is_file()} == before
    shutil.rmtree(place)
    shutil.copytree(kit.path, place)
    train(recipe(place, rows, tmp_path / "run", steps=2, resume=True, **settings), QUIET)
    assert read_json(tmp_path / "run" / "return" / "manifest.json")["kit"] == kit.digest
    assert read_json(tmp_path / "run" / "run.json")["source"] == {"kit": kit.digest}


def test_a_return_that_cannot_be_written_leaves_the_old_pair(kit, rows, tmp_path, monkeypatch):
    settings = {"method": "dense", "save_every": 1, "steps": 1}
    done = train(recipe(kit.path, rows, tmp_path / "run", **settings), QUIET)
    folder = tmp_path / "run"
    before = {p: p.read_bytes() for name in ("adapter", "return") for p in (folder / name).iterdir()}

    def fails(path, model, kit, privacy):
        save_return(path, model, kit)
        raise KitError("no room")

    monkeypatch.setattr("siftune.offsite.exchange.tune.save_return", fails)
    with pytest.raises(KitError, match="no room"):
        train(recipe(kit.path, rows, folder, resume=True, **{**settings, "steps": 2}), QUIET)
    assert {p: p.read_bytes() for name in ("adapter", "return") for p in (folder / name).iterdir()} == before
    assert not list(folder.glob(".*"))
    assert done.folder.path == folder


def test_a_return_makes_a_folder_used(kit, rows, finished):
    with pytest.raises(RecipeError, match="holds a run already"):
        train(recipe(kit.path, rows, finished / "full", method="dense", adapter="full", steps=1), QUIET)


# --- what is refused


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_middle_is_refused_before_anything_is_loaded(kit, rows, tmp_path, monkeypatch, adapter):
    monkeypatch.setattr(module, "load_kit", None)
    with pytest.raises(RecipeError, match=r"layers names 2, but in the kit .*/kit only the outer layers 0, 1, 3 can"):
        train(recipe(kit.path, rows, tmp_path / "run", adapter=adapter, layers=(0, -2)), QUIET)
    with pytest.raises(LayerError, match="the model has 4 layers"):
        train(recipe(kit.path, rows, tmp_path / "run", adapter=adapter, layers=(4,)), QUIET)


def test_a_damaged_kit_is_refused_before_anything_is_loaded(kit, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_kit", None)
    monkeypatch.setattr("siftune.train.source.load_model", None)
    shutil.copytree(kit.path, tmp_path / "kit")
    path = tmp_path / "kit" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(KitError, match=r"adapter\.safetensors"):
        train(recipe(tmp_path / "kit", rows, tmp_path / "run"), QUIET)


# --- the commands


@pytest.fixture(scope="module")
def finished(kit, tmp_path_factory):
    """Runs on the kit: with an adapter, and of the layers themselves."""
    place = tmp_path_factory.mktemp("finished")
    rows = save_rows(place / "rows.jsonl")
    for name, adapter in (("lora", "lora"), ("full", "full")):
        train(recipe(kit.path, rows, place / name, method="dense", adapter=adapter, steps=3, lr=0.02), QUIET)
    return place


@pytest.mark.parametrize("name", ["lora", "full"])
def test_eval_measures_the_emulator_before_and_after(kit, finished, capsys, name):
    options = ["--data", str(finished / "rows.jsonl"), "--metrics", "perplexity", "--limit", "8", "--template", "none"]
    assert main(["eval", str(finished / name), *options, "--json"]) == 0
    [of_run] = json.loads(capsys.readouterr().out)["runs"]
    assert main(["eval", str(kit.path), *options, "--json"]) == 0
    [of_kit] = json.loads(capsys.readouterr().out)["runs"]
    assert of_run["model"] == str(kit.path)
    [before], [alone] = of_run["metrics"], of_kit["metrics"]
    assert before["base"] == pytest.approx(alone["base"], rel=1e-6)
    assert alone["tuned"] is None
    assert before["tuned"] < 0.9 * before["base"]


def test_eval_of_a_full_run_takes_the_return(kit, finished, tmp_path, capsys):
    shutil.copytree(finished / "full", tmp_path / "run")
    path = tmp_path / "run" / "return" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    options = ["--data", str(finished / "rows.jsonl"), "--metrics", "perplexity", "--limit", "2"]
    assert main(["eval", str(tmp_path / "run"), *options]) == 2
    assert "adapter.safetensors has the SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lora", "lora/adapter", "full"])
def test_export_sends_the_data_owner_to_the_owner(finished, capsys, name):
    assert main(["export", str(finished / name)]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert found.startswith(f"siftune: error: {finished}/{name} is of a kit, an emulator that only stands in")
    assert "`siftune plug`" in found
    assert not (finished / name / "merged").exists()


def test_the_command_names_the_return(kit, rows, tmp_path, capsys):
    words = ["train", "--model", str(kit.path), "--train", str(rows), "--template", "none", "--steps", "1"]
    words += ["--adapter", "full", "--layers", "0", "-1", "--method", "dense", "--out", str(tmp_path / "run")]
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["return"] == f"{tmp_path}/run/return"
    assert "adapter" not in result
    last = captured.err.splitlines()[-3:]
    assert last[0].startswith(f"return in {tmp_path}/run/return: send it to the model's owner, who runs `siftune plug ")
    audit = (
        f"`siftune audit --kit {kit.path} --return {tmp_path}/run/return --train {rows} --eval OTHERS --template none "
        "--steps 1 --lr 0.0005 --batch-size 16`"
    )
    assert last[1].endswith(audit)
    assert last[2] == f"next: `siftune eval {tmp_path}/run --data FILE`"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Send the folder RUN/return, and nothing else" in card
    assert "siftune plug --model BASE --kit KIT --return RUN/return --out TUNED" in card
    assert read_kit(kit.path).digest == json.loads((tmp_path / "run/return/manifest.json").read_text())["kit"]


def test_the_audit_of_a_run_that_left_out_bad_rows_names_no_file_with_them(kit, rows, tmp_path, capsys):
    rows.write_text(rows.read_text() + '{"prompt": "no completion"}\n')
    words = ["train", "--model", str(kit.path), "--train", str(rows), "--template", "none", "--steps", "1"]
    assert main([*words, "--bad-rows", "drop", "--out", str(tmp_path / "run")]) == 0
    audit = capsys.readouterr().err.splitlines()[-2]
    assert audit.endswith("`, with a file of exactly the rows that it was tuned on as --train")


@pytest.fixture(scope="module")
def private(kit, tmp_path_factory):
    """A run with differential privacy on a kit."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in arithmetic_rows(24, seed=5)))
    words = ["train", "--model", str(kit.path), "--train", str(folder / "rows.jsonl"), "--template", "none"]
    words += ["--steps", "2", "--batch-size", "4", "--rank", "2", "--dp-epsilon", "8", "--dp-delta", "0.01"]
    assert main([*words, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_private_run_says_so_in_its_return(kit, private, capsys):
    told = read_json(private / "return" / "manifest.json")["privacy"]
    assert told == read_json(private / "run.json")["summary"]["privacy"] == promise_of(private / "return", kit)
    assert (told["delta"], told["steps"]) == (0.01, 2)
    assert 0 < told["epsilon"] <= 8
    assert main(["verify", str(private / "return"), "--kit", str(kit.path), "--max-update", "100"]) == 0
    out = capsys.readouterr().out
    assert "δ = 0.01 for one training row, there or not, after 2 steps: the data owner's word" in out


def test_other_runs_promise_nothing(kit, finished):
    assert promise_of(finished / "lora" / "return", kit) is None


PROMISE = {
    "epsilon": 7.5, "delta": 0.01, "noise_multiplier": 0.8, "clip": 1.0, "sampling_rate": 0.2,
    "expected_batch": 4, "steps": 2, "accountant": "opacus PRV", "accountant_version": "1.6.0",
    "unit": "one training row, there or not",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("epsilon", -1.0), ("epsilon", True), ("delta", 1), ("steps", 2.5), ("unit", "a person"),
     ("accountant_version", "1.6 or so"), ("accountant", "mine"), ("name", "of the data owner")],
)  # fmt: skip
def test_a_promise_is_held_to_its_keys_and_ranges(kit, tmp_path, name, value):
    path = write_return(tmp_path / "return", shipped(kit), kit, PROMISE) / "manifest.json"
    whole = read_json(path)
    path.write_bytes(canonical({**whole, "privacy": {**whole["privacy"], name: value}}))
    with pytest.raises(KitError, match=r"manifest\.json: privacy"):
        read_return(tmp_path / "return", kit)
