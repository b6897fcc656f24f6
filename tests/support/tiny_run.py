"""A tiny model in a folder, rows in a file, and recipes of runs on them that take seconds."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from siftune.methods import METHODS
from siftune.recipe.schema import Recipe
from siftune.train.folder.run_folder import SELECTIONS
from siftune.train.folder.selections import read_selections


def save_base(folder: Path) -> Path:
    """Save a tiny llama with a byte-level tokenizer, as `siftune train --model` takes it."""
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=300, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=512)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int = 24) -> Path:
    """Write rows of different lengths."""
    rows = [{"prompt": f"{i} and {i * i}?", "completion": str(i + i * i)} for i in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(base: Path, rows: Path, out: Path, **settings: Any) -> Recipe:
    """A recipe of six steps of four rows; what is no field of a recipe goes to the settings of its method."""
    rank = None if settings.get("adapter") == "full" else 2
    given: dict[str, Any] = {
        "model": str(base), "train": str(rows), "out": str(out), "max_length": 64, "template": "none", "rank": rank,
        "batch_size": 4, "steps": 6, "lr": 1e-2, "log_every": 1, "method": "ist", **settings,
    }  # fmt: skip
    own = {name: given.pop(name) for name in [*given] if name not in Recipe.__dataclass_fields__}
    kinds = [part.settings for part in METHODS[given["method"]].parts]
    names = {kind: {field.name for field in fields(kind)} for kind in kinds}
    assert own.keys() <= set().union(*names.values()), f"no settings of {given['method']}: {own}"
    own = {"interval": 2, "score_batch_size": 4, "active": 0.5, **own}
    groups = {kind.group: kind(**{name: own[name] for name in names[kind] & own.keys()}) for kind in kinds}
    return Recipe(**given, **groups)


def choices_of(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's record of choices; `followed` has a list for each layer."""
    path = run / SELECTIONS
    choices = read_selections(path).to_pylist() if path.exists() else []
    for choice in choices:
        samples = len(choice["followed"]) // len(choice["layers"])
        choice["followed"] = [choice["followed"][at * samples :][:samples] for at in range(len(choice["layers"]))]
    return choices


def lines(path: Path) -> list[dict[str, Any]]:
    """Read a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
