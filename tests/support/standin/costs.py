"""Launched operations and waits of one step of `siftune train`, for every method, on the stand-in accelerator.

PYTHONPATH=src:tests python -m support.standin.costs    # writes the committed table, `costs.json`, anew
"""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from support import standin
from support.tiny import tiny
from support.tiny_run import recipe, save_rows
from support.tokenizer import byte_tokenizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from siftune.methods import METHODS
from siftune.train import private
from siftune.train.run import train

TABLE = Path(__file__).with_name("costs.json")
LAYERS, ROWS = 12, 8
_FIRST, _COUNT = 3, 10  # steps before those that are counted, and their number: one period of IST

# a new method has a line here: its name in the table -> method and settings
CASES: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "rst": {"method": "rst", "active": 0.25},
    "ist": {"method": "ist", "active": 0.25, "interval": 10, "score_batch_size": ROWS},
    "gast, sample": {"method": "gast", "select": 4, "support": "sample"},
    "gast, averaged": {"method": "gast", "select": 4, "support": "sample", "support_every": 4},
    "gast, rest": {"method": "gast", "select": 4, "support": "rest"},
    "gast, rest, cosine": {"method": "gast", "select": 4, "support": "rest", "score": "cosine"},
    "gast, random": {"method": "gast", "select": 4, "choice": "random"},
    "ist+gast": {
        "method": "ist+gast", "active": 0.25, "interval": 10, "score_batch_size": ROWS, "select": 4, "support": "rest",
    },
    "dp": {"method": "dense", "dp_epsilon": 8.0, "dp_delta": 1e-3},
}  # fmt: skip

assert {case["method"] for case in CASES.values()} == set(METHODS)


def measure(name: str) -> dict[str, float]:
    """Mean `operations` and `waits` of a step; without logs and checkpoints, with the records that every run has."""
    with TemporaryDirectory() as folder, standin.accelerator(), standin.observed() as seen, secret():
        base = Path(folder, "base")
        tokenizer = byte_tokenizer()
        tiny("llama", LAYERS, vocab_size=300, eos_token_id=tokenizer.eos_token_id).save_pretrained(base)
        tokenizer.save_pretrained(base)
        rows = save_rows(Path(folder, "rows.jsonl"), 96)
        ends: list[tuple[int, int]] = []
        handle = register_optimizer_step_post_hook(lambda *_: ends.append(_totals(seen)))
        settings = {"batch_size": ROWS, "steps": _FIRST + _COUNT + 1, "log_every": 1000, "save_every": 1000}
        try:
            train(recipe(base, rows, Path(folder, "run"), **settings, **CASES[name]), Console(quiet=True))
        finally:
            handle.remove()
    before, after = ends[_FIRST - 1], ends[_FIRST + _COUNT - 1]
    operations, waits = ((end - start) / _COUNT for start, end in zip(before, after, strict=True))
    return {"operations": operations, "waits": waits}


def _totals(seen: standin.Observed) -> tuple[int, int]:
    return sum(seen.operations.values()), sum(seen.waits.values())


@contextmanager
def secret():
    """Private runs that draw the same rows every time."""
    from siftune.methods.dp.callback import DP
    from siftune.methods.dp.secret import Secret

    plain = private.DP
    private.DP = lambda mechanism, most: DP(mechanism, most, Secret(7))
    try:
        yield
    finally:
        private.DP = plain


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    table = {name: measure(name) for name in CASES}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
    for name, cost in table.items():
        ratio = cost["operations"] / table["dense"]["operations"]
        print(f"| {name} | {cost['operations']:,.0f} | {ratio:.2f} | {cost['waits']:.1f} |")  # noqa: T201
