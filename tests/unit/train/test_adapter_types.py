"""Adapter types through siftune's own training path: every method, resume, from another run, eval, export."""

import json

import pytest
import torch
from rich.console import Console
from support.tiny_run import recipe
from support.trainers import weights
from transformers import AutoModelForCausalLM

from siftune.base.errors import AdapterError, RecipeError
from siftune.cli.main import main
from siftune.cli.subjects import find_subject, load_subject
from siftune.models.adapters.attach import load_adapter
from siftune.models.adapters.registry import ADAPTER_TYPES, adapter_type_of
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.train.folder.weights import adopted
from siftune.train.run import train

QUIET = Console(quiet=True)
IDS = torch.tensor([[5, 80, 91, 17, 200, 44]])
KINDS = [kind for kind in ADAPTER_TYPES if kind not in ("lora", "rslora", "dora")]  # these are tried everywhere else
every_kind = pytest.mark.parametrize("kind", KINDS)
DENSE = {"method": "dense", "lr": 0.05}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def sized(kind):
    return {"rank": 2 if "rank" in ADAPTER_TYPES[kind].keys else None}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """Runs of every kind, which are made once."""
    from support.tiny_run import save_rows

    place, runs = tmp_path_factory.mktemp("finished"), {}

    def get(kind):
        if kind not in runs:
            rows = save_rows(place / "rows.jsonl")
            runs[kind] = train(recipe(base, rows, place / kind, adapter=kind, **{**DENSE, **sized(kind)}), QUIET)
        return runs[kind]

    return get


@every_kind
def test_a_run_is_loaded_as_it_was_left(finished, base, kind):
    done = finished(kind)
    config = json.loads((done.folder.adapter / "adapter_config.json").read_text())
    assert adapter_type_of(config) == kind
    assert not list(done.folder.path.rglob("*.bin"))
    subject, _ = load_subject(find_subject(str(done.folder.path)))
    torch.testing.assert_close(logits(subject), logits(done.model), rtol=1e-5, atol=1e-5)
    assert float((logits(subject) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 1e-2
    names = {name for name, p in done.model.named_parameters() if p.requires_grad}
    assert {name for name, value in weights(subject).items()} <= names


@every_kind
def test_export(finished, base, kind, tmp_path, capsys):
    done = finished(kind)
    status = main(["export", str(done.folder.path), "--out", str(tmp_path / "merged")])
    if ADAPTER_TYPES[kind].unmergeable:
        assert status == 2
        assert f"cannot be merged: {ADAPTER_TYPES[kind].unmergeable}" in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()
    else:
        assert status == 0
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), logits(done.model), rtol=1e-4, atol=1e-4)


@every_kind
def test_a_further_run_has_its_settings(finished, kind):
    run = finished(kind).folder
    before, further = load_recipe(run.path / "recipe.yaml"), adopted(Recipe(from_adapter=str(run.path)))
    assert (further.adapter, further.rank, further.alpha) == (kind, before.rank, before.alpha)


def test_the_code_on_the_card_runs(finished, base, monkeypatch):
    done = finished("series")
    monkeypatch.chdir(done.folder.path)
    code = (done.folder.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace(repr(base.name), repr(str(base))), found)
    torch.testing.assert_close(logits(found["model"]), logits(done.model), rtol=1e-5, atol=1e-5)


def test_a_rank_that_a_kind_does_not_have_is_refused(base, rows, tmp_path):
    with pytest.raises(RecipeError, match=r"rank is 2, .* ln"):
        check(recipe(base, rows, tmp_path / "run", adapter="ln"))


def test_a_kind_that_is_not_known_is_refused(base, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SHADOW"}')
    with pytest.raises(AdapterError, match="SHADOW is not supported"):
        train(recipe(base, tmp_path, tmp_path / "run", from_adapter=str(tmp_path)), QUIET)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BOTTLENECK", "parallel": True}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="does not fit"):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path, "base")
