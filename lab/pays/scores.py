"""Scores of a pool's rows beside each other: how well each tells wrong rows, or rows of other tasks, from correct ones.

python -m lab.pays.scores CELL --data FOLDER [--rows 600] [--seed 0] [--known 100] [--model smollm2] [--steps 60]

The training is that of `siftune sift`: on four fifths of the target's rows, until the loss of the others no longer
falls. K is a row's loss after it, B before it, both summed over its n label tokens. Printed are, for every score, the
AUC of wrong and of other rows against correct ones (1: each has a higher score), and what the limit of four in five
held-out rows would leave: the share of wrong rows among the selected, and of the correct rows that remain. Prompts are
not compared. The last lines have the AUC of decoys against held-out rows, and the estimate by decoys.
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.commands import Commands, flags, load_tuned, write_rows
from lab.models import source
from lab.pays.cells import cells_of
from lab.pays.job import draw
from lab.pays.pool import Pool, asked
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.sifting.rows import held_out_count
from siftune.sifting.scores import separation
from siftune.sifting.share import share_like_decoys

Floats = NDArray[np.float64]
_DECOYS = 4  # of each held-out row, as in siftune sift
_WITHIN = 0.8  # of the held-out rows
FORMULAS = {
    "K / n": lambda k, _, n: k / n,
    "K / √n": lambda k, _, n: k / np.sqrt(n),
    "K": lambda k, _, n: k,
    "(K − B) / n": lambda k, b, n: (k - b) / n,
    "(K − B) / B": lambda k, b, _: (k - b) / b,
}


def losses(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> tuple[Floats, Floats]:
    """Losses of rows, summed over label tokens, and the numbers of these."""
    data = tokenize_rows(rows_from([asked(row) for row in rows]), tokenizer, 512, "none")
    with short_rows():
        result = row_nll(model, list(zip(data["input_ids"], data["labels"], strict=True)), 64)
    return result.nll, result.tokens.astype(float)


def decoys_of(rows: Sequence[dict[str, Any]], every: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows with completions of others."""
    rng, texts = np.random.default_rng(seed), sorted({row["completion"] for row in every})
    return [
        {**row, "completion": str(text)}
        for row in rows
        for others in [[text for text in texts if text != row["completion"]]]
        for text in rng.choice(others, min(_DECOYS, len(others)), replace=False)
    ]


def table(values: dict[str, tuple[Floats, Floats, Floats]], groups: Sequence[str]) -> list[str]:
    """A line for each score.

    Args:
        values: `pool` and `held_out`: K, B and n of their rows.
        groups: Group of each row of the pool: "target", "wrong", or another task.
    """
    kinds = np.array(groups)
    correct, wrong = kinds == "target", kinds == "wrong"
    lines = []
    for name, formula in FORMULAS.items():
        pool, held_out = formula(*values["pool"]), formula(*values["held_out"])
        within = (pool <= np.quantile(held_out, _WITHIN, method="higher")) & (correct | wrong)
        parts = [
            f"AUC {title} {separation(pool[part], pool[correct]):.3f}"
            for title, part in (("wrong", wrong), ("others", ~correct & ~wrong))
            if part.any()
        ]
        left = f"wrong among selected {wrong[within].mean():.1%}, correct that remain {within[correct].mean():.1%}"
        lines.append(f"{name:12} {', '.join(parts)}; {left}")
    return lines


def compare(job: dict[str, Any], pool: Pool) -> list[str]:
    """Train as `siftune sift` does, in the working directory, and score; the lines to print."""
    count = len(pool.known)
    aside = {round(place) for place in np.linspace(0, count - 1, held_out_count(count))}
    held_out = [row for number, row in enumerate(pool.known) if number in aside]
    seen = [row for number, row in enumerate(pool.known) if number not in aside]
    for name, rows in (("seen", seen), ("unseen", held_out)):
        write_rows(f"{name}.jsonl", [asked(row) for row in rows])
    settings = {"model": source(job["model"]), "template": "none", "seed": job["seed"], "lr": job["lr"]}
    settings |= {"steps": job["steps"], "eval_every": 10, "patience": 2, "out": "run"}
    Commands().run("train", "--train", "seen.jsonl", "--eval", "unseen.jsonl", *flags(settings))
    model, tokenizer = load_tuned("run")
    parts = {"pool": pool.train, "held_out": held_out}
    after = {name: losses(model, tokenizer, rows) for name, rows in parts.items()}
    made, tokens = losses(model, tokenizer, decoys_of(held_out, pool.known, job["seed"]))
    with model.disable_adapter():
        before = {name: losses(model, tokenizer, rows)[0] for name, rows in parts.items()}
    values = {name: (after[name][0], before[name], after[name][1]) for name in parts}
    groups = [row["group"] for row in pool.train]
    own = np.isin(groups, ("target", "wrong"))
    scores, target = (after[name][0] / np.sqrt(after[name][1]) for name in ("pool", "held_out"))
    decoys = made / np.sqrt(tokens)
    return [
        *table(values, groups),
        f"AUC of decoys against held-out rows, K / √n: {separation(decoys, target):.3f}",
        f"task's rows as unlikely as decoys: {share_like_decoys(scores[own], decoys, least=8):.1%} or less",
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the scores of a cell; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cell", help="a cell of S1 or N, such as mix or intents-a")
    add("--data", type=Path, default=Path())
    add("--rows", type=int, help="use the first N rows of the pool")
    add("--seed", type=int, default=0)
    add("--known", type=int, default=100)
    add("--model", default="smollm2")
    add("--steps", type=int, default=60, help="at most")
    add("--lr", type=float, default=5e-4)
    args = parser.parse_args(argv)
    try:
        (cell,) = cells_of("S1", [args.cell], args.known)
    except ValueError:
        (cell,) = cells_of("N", [args.cell], args.known)
    job = {"cell": cell, "steps": 120, "batch": 16, **{name: getattr(args, name) for name in ("seed", "model", "lr")}}
    pool = draw(job, args.data.resolve())
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        print("\n".join(compare({**job, "steps": args.steps}, replace(pool, train=pool.train[: args.rows]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
