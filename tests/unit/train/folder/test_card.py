"""Cards: the code on them runs as printed, wherever it is run, and what the hub reads is right."""

import contextlib
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from support.commands import siftune
from support.tiny_run import recipe, save_base, save_rows
from support.tokenizer import byte_tokenizer

from siftune.base.environment import ABOUT
from siftune.cli.main import main
from siftune.data.encode import Encoder
from siftune.data.rows import Row
from siftune.data.turns import Message
from siftune.models.source import Origin
from siftune.recipe.schema import Recipe
from siftune.train.folder.card import merged_card, model_card
from siftune.train.run import train

ASKED = "What can you do?"
SUMMARY = {"steps": 3, "loss_last": 1.0, "eval_loss": None, "seconds": 1.0, "peak_memory_mb": 1.0}


@pytest.fixture(scope="module")
def licensed(tmp_path_factory):
    """A base model with a licence, and rows."""
    place = save_base(tmp_path_factory.mktemp("place") / "base")
    (place / "README.md").write_text("---\nlicense: mit\n---\n")
    (place / "LICENSE").write_text("Do as you like.")
    return place, save_rows(place.parent / "rows.jsonl")


def run_code(card, folder, base):
    """Run the card's code beside its folder, with the path of the base model; what it prints and makes."""
    names: dict = {"__name__": "card"}
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        code = card.split("```python\n")[1].split("```")[0]
        exec(code.replace(repr(base.name), repr(str(base))), names)
    return printed.getvalue(), names["inputs"], names["output"]


def asked(capsys, card, folder, *more):
    """Run the card's command beside its folder; the answer of its model."""
    program, *words = shlex.split(card.split("```sh\n")[1].split("```")[0])
    assert program == "siftune"
    with contextlib.chdir(folder):
        [found] = siftune(capsys, *words, "--max-new-tokens", 64, *more)[0]["answers"]
    return found["tuned"] or found["base"]


def head_of(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("settings", "library"),
    [
        ({"template": "none"}, "peft"),
        ({"template": "chat", "adapter": "full", "layers": (0, -1)}, "transformers"),
    ],
    ids=["adapter", "layers"],
)
def test_code_and_command_run_as_printed(licensed, tmp_path, monkeypatch, capsys, settings, library):
    base, _ = licensed
    monkeypatch.chdir(base.parent)
    given = {"method": "dense", "steps": 2, "lr": 0.05, **settings}
    done = train(recipe("base", "rows.jsonl", tmp_path / "run", **given), Console(quiet=True))
    card = (tmp_path / "run" / "README.md").read_text()
    assert card == (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert head_of(card) == {
        "base_model": base.name, "library_name": library, "tags": ["siftune", "dense", given.get("adapter", "lora")],
        "license": "mit",
    }  # fmt: skip
    printed, inputs, output = run_code(card, tmp_path / "run", base)
    row = Row((Message("user", ASKED),), "", origin="here")
    assert inputs["input_ids"][0].tolist() == Encoder(byte_tokenizer(), settings["template"]).prompt(row)
    ours = done.model.eval().generate(**inputs, max_new_tokens=64)
    assert torch.equal(ours, output)
    assert f"{asked(capsys, card, tmp_path / 'run', '--base', base)}\n" == printed


def test_a_merged_model_has_card_and_licence_and_runs_as_printed(licensed, tmp_path, capsys):
    base, rows = licensed
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=2, lr=0.05), Console(quiet=True))
    assert main(["export", str(tmp_path / "run")]) == 0
    merged = tmp_path / "run" / "merged"
    assert (merged / "LICENSE").read_text() == "Do as you like."
    card = (merged / "README.md").read_text()
    assert head_of(card) == {
        "base_model": base.name, "library_name": "transformers", "tags": ["siftune", "dense", "lora"],
        "base_model_relation": "finetune", "license": "mit",
    }  # fmt: skip
    assert "terms apply to this model too: mit.\n- `LICENSE`" in card
    assert "all layers follow all rows" in card
    assert str(tmp_path) not in card
    printed, _, output = run_code(card, tmp_path / "run", base)
    again, _, apart = run_code((tmp_path / "run" / "README.md").read_text(), tmp_path / "run", base)
    assert torch.equal(output, apart)
    assert printed == again
    assert "give its path" not in card
    assert f"{asked(capsys, card, tmp_path / 'run')}\n" == printed


def test_an_adapter_without_a_run_gets_a_card_as_well(licensed, tmp_path, capsys):
    base, rows = licensed
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=1), Console(quiet=True))
    assert main(["export", str(tmp_path / "run" / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert head_of(card)["tags"] == ["siftune"]
    assert "## Recipe" not in card
    assert card.splitlines()[-1] == (tmp_path / "run" / "README.md").read_text().splitlines()[-1] == ABOUT
    assert str(base.parent) not in card


def test_a_card_has_names_of_files_and_no_paths(licensed, tmp_path):
    base, rows = licensed
    few, drop = save_rows(tmp_path / "few.jsonl", 4), tmp_path / "drop.txt"
    right = save_rows(tmp_path / "right.jsonl", 5)
    drop.write_text(f"{rows}:2\n")
    files = {"eval": str(few), "target": str(right), "drop_rows": str(drop)}
    given = recipe(base, rows, tmp_path / "run", method="dense", steps=1, **files)
    train(replace(given, train=(str(rows), str(few))), Console(quiet=True))
    again = recipe(base, rows, tmp_path / "again", method="dense", steps=1, from_adapter=str(tmp_path / "run"))
    train(again, Console(quiet=True))
    for card in (tmp_path / "run" / "README.md", tmp_path / "again" / "adapter" / "README.md"):
        text = card.read_text()
        assert str(tmp_path) not in text
        assert str(base.parent) not in text
        assert f"model: {base.name}" in text
    assert str(rows) in (tmp_path / "again" / "recipe.yaml").read_text()


def test_names_from_elsewhere_do_not_leave_their_field():
    base = Origin("/models/a: b, [c] # x", None, None)
    card = model_card(Recipe(train="x", alpha=1), SUMMARY, base, Path("/r/adapter"), chat=False)
    assert set(head_of(card)) == {"base_model", "library_name", "tags"}
    assert head_of(card)["base_model"] == "a: b, [c] # x"
    assert head_of(merged_card(None, base, Path("/m"), chat=True))["base_model"] == "a: b, [c] # x"


def test_the_hubs_name_is_told_where_it_is_known():
    base = Origin("/cache/smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    card = model_card(Recipe(train="x", alpha=1), SUMMARY, base, Path("/r/adapter"), chat=True)
    assert head_of(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "from_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct')" in card
    assert "/cache" not in card
    assert json.dumps(head_of(card)["license"]) == '"apache-2.0"'
