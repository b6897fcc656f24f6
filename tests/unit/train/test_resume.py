"""Resumed runs: bit-identical to unbroken ones, and checkpoints of other runs are refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from support.seen import assert_same
from support.tiny_run import choices_of, lines, recipe, save_rows
from support.trainers import At, stop

from siftune.base.errors import InputError, RecipeError
from siftune.cli.demo_rows import arithmetic_rows
from siftune.cli.main import main
from siftune.recipe.read import load_recipe, recipe_to_yaml
from siftune.train.folder.checkpoints import SEAL
from siftune.train.resume import digest_of_tokens
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)
FULL = {"adapter": "full", "layers": (0, -1), "method": "dense"}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """Finished runs of three steps, by their settings, and their rows; each is made once."""
    place, runs = tmp_path_factory.mktemp("finished"), {}
    rows = save_rows(place / "rows.jsonl")

    def get(**settings):
        key = json.dumps(settings)
        if key not in runs:
            out = place / str(len(runs))
            train(recipe(base, rows, out, steps=3, save_every=1, **settings), QUIET)
            runs[key] = out
        return runs[key], rows

    return get


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a finished run, and a function for recipes that resume it."""

    def get(**settings):
        run, rows = finished(**settings)
        shutil.copytree(run, tmp_path / "run")
        given = {"save_every": 1, "steps": 3, "resume": True, **settings}
        base = load_recipe(run / "recipe.yaml").model
        return tmp_path / "run", lambda **more: recipe(base, rows, tmp_path / "run", **{**given, **more})

    return get


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(run):
    (path,) = (run / "adapter").glob("*.safetensors")
    return load_file(path)


def metrics(run):
    """The lines of the metrics without times."""
    names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "num_input_tokens_seen", "active_layers")
    kept = [line for line in lines(run / "metrics.jsonl") if "loss" in line or "eval_loss" in line]
    return [{name: line[name] for name in line if name in names or name.startswith("loss/")} for line in kept]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ist+gast", "support_every": 3, "accumulate": 2, "adapter": "series", "dropout": 0.1},
        {"method": "ist+gast", "support_every": 3, "dtype": "bfloat16", "adapter": "full", "layers": (0, -1)},
        {"method": "dense", "target": "few.jsonl", "target_last": 0.4, "steps": None, "epochs": 3},
        {"method": "dense", "group_by_length": True, "batch_size": 8},
    ],
    ids=["adapter", "layers", "target", "length"],
)
def test_a_resumed_run_is_the_unbroken_one(base, rows, tmp_path, interfere, settings):
    settings = {"save_every": 2, "steps": 8, "eval": str(rows), "eval_every": 2, "weight_decay": 0.1, **settings}
    if "target" in settings:
        settings["target"] = str(tmp_path / "few.jsonl")
        few = "".join(json.dumps(row) + "\n" for row in arithmetic_rows(3, seed=9))
        (tmp_path / "few.jsonl").write_text(few)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(recipe(base, rows, unbroken, **settings), QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiftTrainer, "__init__", SiftTrainer.__init__)
        interfere(At("on_pre_optimizer_step", 6, stop))
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(recipe(base, rows, broken, **settings), QUIET)
    resume = f"`siftune train --resume {broken}` continues from step 4"
    assert stopped.value.__notes__ == [f"the adapter after step 5 is in {broken}/adapter, and {resume}"]
    assert json.loads((broken / "run.json").read_text())["status"] == "interrupted"
    torch.manual_seed(99)
    done = train(recipe(base, rows, broken, resume=True, **settings), QUIET)
    assert_same(weights(broken), weights(unbroken))
    assert metrics(broken) == metrics(unbroken)
    assert choices_of(broken) == choices_of(unbroken)
    assert done.summary["loss_first"] == metrics(unbroken)[0]["loss"]
    one, other = (load_recipe(run / "recipe.yaml") for run in (unbroken, broken))
    assert replace(other, out=one.out) == one


def test_a_run_that_is_extended_has_the_rates_of_its_new_length(finished, copied):
    run, resumed = copied()
    (run / "eval.json").write_text("{}")  # of the model before
    train(resumed(steps=6), QUIET)
    assert not (run / "eval.json").exists()
    rates = [line["learning_rate"] for line in metrics(run)]
    assert rates == pytest.approx([0, 0.01, 0.005, 0.006, 0.004, 0.002])
    before, after = (
        load_file(run / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (3, 4)
    )
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_a_named_checkpoint(finished, copied):
    run, resumed = copied()
    train(resumed(resume=str(run / "checkpoints" / "checkpoint-2")), QUIET)
    assert_same(weights(run), weights(finished()[0]))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]


def test_a_damaged_checkpoint_is_skipped(finished, copied, caplog):
    run, resumed = copied()
    optimizer = run / "checkpoints" / "checkpoint-3" / "optimizer.pt"
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 1
    optimizer.write_bytes(data)
    train(resumed(), QUIET)
    assert "checkpoint-3 is skipped: optimizer.pt" in caplog.text
    assert_same(weights(run), weights(finished()[0]))
    assert choices_of(run) == choices_of(finished()[0])


def test_no_checkpoint(base, rows, tmp_path):
    for resume, message in ((True, "no complete checkpoint"), (str(tmp_path / "none"), "none is no complete")):
        with pytest.raises(InputError, match=message):
            train(recipe(base, rows, tmp_path / "run", resume=resume), QUIET)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, {"rank": 3}, "r = 2"),
        ({}, {"targets": ("q_proj",)}, "target_modules = .* instead; set targets and layers"),
        ({}, {"adapter": "dora"}, "set adapter"),
        ({}, {"lr": 0.02}, "lr 0.01, this recipe has 0.02"),
        ({}, {"method": "rst"}, "method ist, this recipe has rst"),
        ({}, {"active": 1}, "ist.active 0.5, this recipe has 1"),
        ({}, {"batch_size": 2}, "batch_size 4, this recipe has 2"),
        ({}, {"limit": 12}, "other training rows"),
        ({}, FULL, "method ist, this recipe has dense"),
        ({"method": "dense"}, FULL, "adapter"),
        ({**FULL}, {"layers": (0, 1)}, "set layers"),
        ({**FULL}, {"adapter": "lora", "layers": (0, 3), "rank": 2}, "adapter"),
        ({**FULL}, {"steps": 3}, "all of 3 steps"),
    ],
)
def test_checkpoints_of_other_runs_are_refused(copied, settings, change, message):
    run, resumed = copied(**settings)
    before = contents(run)
    with pytest.raises(RecipeError, match=rf"checkpoint-3 (?s:.*){message}"):
        train(resumed(**{"steps": 4, **change}), QUIET)
    assert contents(run) == before


def test_an_edited_recipe_does_not_change_the_adapter_of_a_checkpoint(copied):
    run, resumed = copied()
    path = run / "recipe.yaml"
    path.write_text(recipe_to_yaml(replace(load_recipe(path), alpha=64)))
    with pytest.raises(RecipeError, match=r"lora_alpha = 4, .* 64; set alpha"):
        train(resumed(steps=4, alpha=64), QUIET)


def test_rows_are_told_apart_by_their_tokens_labels_and_weights():
    def digest(ids=((1, 2), (3,)), labels=((-100, 2), (3,)), **more):
        return digest_of_tokens(Dataset.from_dict({"input_ids": ids, "labels": labels, **more}))

    others = {
        digest(ids=((1, 2), (4,))), digest(labels=((1, 2), (3,))), digest(((1,), (2, 3)), ((-100,), (2, 3))),
        digest(weight=[1.0, 2.0]), digest(weight=[2.0, 1.0]),
    }  # fmt: skip
    assert len(others - {digest()}) == 5


def test_length_logs_and_evaluation_may_change(copied):
    run, resumed = copied()
    more = {"steps": 4, "eval": str(run.parent / "run" / "eval.jsonl"), "log_every": 3, "save_every": 2}
    save_rows(run / "eval.jsonl", 3)
    done = train(resumed(**more), QUIET)
    assert (done.summary["steps"], done.summary["resumed_step"]) == (4, 3)
    assert done.summary["eval_loss"] is not None
    card = (run / "adapter" / "README.md").read_text()
    assert ", for the steps after 3 |" in next(line for line in card.splitlines() if line.startswith("| time |"))


def test_epochs_that_are_done(base, rows, tmp_path):
    settings = {"method": "dense", "steps": None, "epochs": 0.5, "batch_size": 4, "accumulate": 2}
    done = train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    with pytest.raises(RecipeError, match=f"all of {done.summary['steps']} steps are done"):
        train(recipe(base, rows, tmp_path / "run", resume=True, **settings), QUIET)


def test_a_run_folder_is_resumed_by_its_own_recipe(copied, capsys):
    run, _ = copied()
    for words in (["--resume", str(run)], [f"--resume={run}"]):
        assert main(["train", *words, "--out", str(run)]) == 2
        assert "all of 3 steps are done" in capsys.readouterr().err
    assert main(["train", "--steps", "4", "--resume", str(run), "--out", str(run), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 4
    assert "done: 4 steps, those after 3 in " in captured.err
    assert load_recipe(run / "recipe.yaml").lr == 0.01
    assert (run / "checkpoints" / "checkpoint-4" / SEAL).is_file()
