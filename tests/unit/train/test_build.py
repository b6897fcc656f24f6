"""Trainer arguments, trackers, compilation."""

import logging
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.tiny_run import lines, recipe
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.cli.main import main
from siftune.engine.compiled import CompiledParts
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.train import arguments, build
from siftune.train import source as module
from siftune.train.arguments import check_trackers, training_arguments
from siftune.train.run import train


def test_one_gpu_of_several_is_used(tmp_path, monkeypatch, caplog):
    """Otherwise the Trainer copies the model to all of them."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 3))
    with caplog.at_level(logging.WARNING, logger="siftune"):
        made = training_arguments(Recipe(), tmp_path, fp16=False)
    assert made._n_gpu == 1
    assert "of 3 GPUs the first is used" in caplog.text


@pytest.mark.parametrize(("kind", "asynchronous"), [("cuda", True), ("mps", False), (None, False)])
def test_the_host_waits_for_copies_to_apples_devices(tmp_path, monkeypatch, kind, asynchronous):
    monkeypatch.setattr(arguments, "_accelerator", lambda: kind)
    made = training_arguments(Recipe(), tmp_path, fp16=False)
    assert made.accelerator_config.non_blocking is asynchronous


@pytest.mark.parametrize(
    ("optim", "message"),
    [("adafactr", "'adafactor'"), ("lomo", "during backward"), ("galore_adamw_layerwise", "during backward")],
)
def test_an_optimizer_that_cannot_be_used(tmp_path, optim, message):
    with pytest.raises(RecipeError, match=message):
        training_arguments(Recipe(optim=optim), tmp_path, fp16=False)
    assert str(training_arguments(Recipe(optim="adafactor"), tmp_path, fp16=False).optim.value) == "adafactor"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard", "mlflow"])


@pytest.mark.parametrize("names", [("none",), ("tensorboard",), ("tensorboard", "mlflow")])
def test_what_is_there(names):
    check_trackers(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("wandb",), "`pip install wandb`"),
        (("tensorboard", "azure_ml"), "`pip install azure-ml`"),
    ],
)
def test_a_missing_package_is_named(names, message):
    with pytest.raises(RecipeError) as caught:
        check_trackers(names)
    assert message in str(caught.value)


def test_it_comes_before_the_model(base, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_model", None)
    words = ["train", "--model", str(base), "--train", str(rows), "--out", str(tmp_path / "run")]
    assert main([*words, "--report-to", "tensorboard", "wandb"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "pip install wandb" in last
    assert not (tmp_path / "run").exists()


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Without torch's own compiler, which takes seconds."""
    torch.compiler.reset()
    monkeypatch.setattr(build, "CompiledParts", partial(CompiledParts, backend="eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["dense", "gast"])
def test_a_compiled_run_leaves_what_a_run_leaves(base, rows, tmp_path, method):
    settings = {"method": method, "steps": 3, "accumulate": 2, "checkpointing": True}
    ours, theirs = (
        train(recipe(base, rows, tmp_path / str(compiled), compile=compiled, **settings), Console(quiet=True))
        for compiled in (True, False)
    )
    found, wanted = (load_file(run.folder.adapter / "adapter_model.safetensors") for run in (ours, theirs))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    told = [line.get("compile_seconds", 0) for line in lines(ours.folder.path / "metrics.jsonl")]
    assert told[0] > 0
    assert not any("forward" in vars(module) for module in ours.model.modules())


@pytest.mark.parametrize("change", [{"adapter": "dora"}, {"quantize": "8bit"}, {"sharding": "fsdp"}])
def test_what_does_not_go_with_compile_is_refused(tmp_path, change):
    made = resolve_recipe(recipe(tmp_path, tmp_path, tmp_path, method="dense", compile=True, **change))
    with pytest.raises(RecipeError, match="compile goes with"):
        check(made)


def broken(*_):
    raise RuntimeError("No working C++ compiler found")


def test_a_run_that_cannot_be_compiled_ends_in_a_sentence(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CompiledParts", partial(CompiledParts, backend=broken))
    made = recipe(base, rows, tmp_path / "run", method="dense", compile=True)
    with pytest.raises(UnsupportedError, match=r"cannot compile Llama.*No working C\+\+ compiler found"):
        train(made, Console(quiet=True))
