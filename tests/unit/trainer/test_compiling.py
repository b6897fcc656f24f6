"""A run whose layers are compiled, and which runs are."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from support.adapted import adapted
from support.tiny_run import lines, recipe
from transformers import TrainingArguments

from siftune.config import resolve_recipe
from siftune.engine.compiled import CompiledParts
from siftune.errors import RecipeError, UnsupportedError
from siftune.recipe_checks import check
from siftune.trainer import compiling
from siftune.trainer.compiling import compiled_parts
from siftune.trainer.run import train


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Without torch's own compiler, which takes seconds."""
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "CompiledParts", partial(CompiledParts, backend="eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["dense", "gast"])
def test_a_compiled_run_leaves_what_a_run_leaves(base, rows, tmp_path, method):
    ours, theirs = (
        train(
            recipe(base, rows, tmp_path / name, method=method, compile=name, steps=3, accumulate=2, checkpointing=True),
            Console(quiet=True),
        )
        for name in ("on", "off")
    )
    found, wanted = (load_file(run.folder.adapter / "adapter_model.safetensors") for run in (ours, theirs))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    told = [line.get("compile_seconds", 0) for line in lines(ours.folder.path / "metrics.jsonl")]
    assert told[0] > 0
    assert not any("forward" in vars(module) for module in ours.model.modules())


def rows_of(length: int) -> Dataset:
    return Dataset.from_dict({"length": np.full(8, length)})


@pytest.mark.parametrize(("length", "runs"), [(99, False), (101, True)])
def test_auto_compiles_runs_that_are_long_enough(tmp_path, monkeypatch, length, runs):
    model = adapted("llama")
    weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    monkeypatch.setattr(compiling, "PAYS_FROM", 30 * 2 * 4 * 100 * weights)  # steps, accumulated, rows, tokens
    made = recipe(tmp_path, tmp_path, tmp_path, method="dense", compile="auto", steps=30, accumulate=2)
    arguments = TrainingArguments(str(tmp_path), max_steps=30, use_cpu=True)
    parts = compiled_parts(made, model, arguments, rows_of(length))
    assert (parts is not None) == runs
    if parts is not None:
        parts.remove()


@pytest.mark.parametrize("change", [{"method": "gast"}, {"adapter": "dora"}, {"compile": "off"}, {"quantize": "8bit"}])
def test_auto_leaves_other_runs_alone(tmp_path, monkeypatch, change):
    monkeypatch.setattr(compiling, "PAYS_FROM", 0)
    made = recipe(tmp_path, tmp_path, tmp_path, **{"method": "dense", "compile": "auto", **change})
    arguments = TrainingArguments(str(tmp_path), max_steps=30, use_cpu=True)
    assert compiled_parts(made, adapted("llama"), arguments, rows_of(9)) is None


@pytest.mark.parametrize("change", [{"adapter": "dora"}, {"quantize": "8bit"}, {"sharding": "fsdp"}])
def test_what_does_not_go_with_compile_is_refused(tmp_path, change):
    made = resolve_recipe(recipe(tmp_path, tmp_path, tmp_path, method="dense", compile="on", **change))
    with pytest.raises(RecipeError, match="compile goes with adapters lora, rslora and full"):
        check(made)


def test_what_cannot_be_compiled_is_told_with_auto_and_refused_with_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "PAYS_FROM", 0)
    model = adapted("llama")
    model.base_model.model.model.layers[1].mlp.forward = lambda hidden: hidden
    arguments = TrainingArguments(str(tmp_path), max_steps=30, use_cpu=True)
    made = partial(recipe, tmp_path, tmp_path, tmp_path, method="dense")
    assert compiled_parts(made(compile="auto"), model, arguments, rows_of(9)) is None
    assert "nothing is compiled: something has put a forward of its own on LlamaMLP" in caplog.text
    with pytest.raises(UnsupportedError, match="forward of its own"):
        compiled_parts(made(compile="on"), model, arguments, rows_of(9))
