"""A run whose layers are compiled, and which runs cannot be."""

from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.tiny_run import lines, recipe

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.engine.compiled import CompiledParts
from siftune.recipe.checks import check
from siftune.recipe.schema import resolve_recipe
from siftune.train import build
from siftune.train.run import train


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
    with pytest.raises(RecipeError, match="compile goes with adapters lora, rslora and full"):
        check(made)


def broken(*_):
    raise RuntimeError("No working C++ compiler found")


def test_a_run_that_cannot_be_compiled_ends_in_a_sentence(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CompiledParts", partial(CompiledParts, backend=broken))
    made = recipe(base, rows, tmp_path / "run", method="dense", compile=True)
    with pytest.raises(UnsupportedError, match=r"cannot compile Llama.*No working C\+\+ compiler found"):
        train(made, Console(quiet=True))
