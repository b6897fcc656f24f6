"""LiRA against private training, by ε: tiny models, with shadow models trained under the same privacy.

    python -m lab.lira_epsilon --epsilons none,100,8,1 --models 16 --out FILE
    python -m lab.lira_epsilon --report FILE

The strongest attacker that `siftune audit` knows, and more: the shadow models are trained by the same command, with the
same ε and settings, on halves of the same rows (`siftune.offsite.audits.lira`). A random llama of 4 layers, rows of
random letters, LoRA in all layers. Each of `--models` models is the one in question in turn, and the others are its
shadows, so that the AUC of a row of the table is a mean over them; the range is over them, too. Without ε it is
`--method dense`, with the same steps and rate. A finished model adds a line of JSON to FILE.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lab.lines import append, key, read
from lab.random_llama import save_llama
from siftune.base.environment import versions
from siftune.cli.subjects import find_subject, load_subject
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.bootstrap import Bootstrap
from siftune.offsite.audits.lira import confidence, halves, lira
from siftune.offsite.audits.members import score_losses
from siftune.offsite.audits.membership import measure_attack
from siftune.recipe.schema import Recipe
from siftune.report.table import Table, markdown_table
from siftune.train.run import train

Job = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, or print the report; return the exit code."""
    args = _parse(argv)
    if args.report:
        print(report(read(args.report)))
        return 0
    torch.set_num_threads(1)
    done = {key(line["job"]) for line in read(args.out)}
    with tempfile.TemporaryDirectory(prefix="siftune-lira-") as scratch:
        base = save_llama(Path(scratch) / "base", 4, 64, 64, spread=0.3)
        for number in range(args.models):
            for epsilon in args.epsilons.split(","):
                job = {name: getattr(args, name) for name in ("models", "rows", "steps", "batch", "lr", "rank", "seed")}
                job |= {"epsilon": epsilon, "number": number}
                if key(job) not in done:
                    nll = measure(job, base, Path(scratch) / f"{epsilon}-{number}")
                    append(args.out, {"job": job, "nll": nll, "versions": versions()})
                    print(f"ε {epsilon}, model {number}: {np.mean(nll):.3f} nats per token", flush=True)
    return 0


def measure(job: Job, base: str, folder: Path) -> list[float]:
    """Train one model on its half of the rows; the mean loss of every row, in nats per token."""
    texts, rows = _texts(job), folder.with_suffix(".jsonl")
    half = halves(job["models"], len(texts), job["seed"])[job["number"]]
    chosen = [text for text, inside in zip(texts, half, strict=True) if inside]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    recipe = Recipe(
        model=base, train=str(rows), out=str(folder), method="dense", adapter="lora", rank=job["rank"], lr=job["lr"],
        steps=job["steps"], batch_size=job["batch"], seed=job["number"], log_every=job["steps"], template="none",
        dp_epsilon=None if job["epsilon"] == "none" else float(job["epsilon"]),
        dp_delta=None if job["epsilon"] == "none" else 1e-5,
    )  # fmt: skip
    train(recipe, Console(quiet=True))
    model, tokenizer = load_subject(find_subject(str(folder)))
    data = tokenize_rows(rows_from([{"text": text} for text in texts]), tokenizer, 64, "none", False)
    scores = score_losses(model, data, 32)
    found: list[float] = (scores.nll / scores.tokens).round(6).tolist()
    return found


def _texts(job: Job) -> list[str]:
    drawn = random.Random(job["seed"])
    return ["".join(drawn.choices("abcdefghijklmnop", k=24)) for _ in range(job["rows"])]


def report(lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, by ε."""
    table = []
    for epsilon in dict.fromkeys(line["job"]["epsilon"] for line in lines):
        own = [line for line in lines if line["job"]["epsilon"] == epsilon]
        if len(own) < own[0]["job"]["models"]:
            continue  # a row may have no shadow of one kind yet
        told = [_told(own, number) for number in range(len(own))]
        means = [f"{np.mean(part):.3f} ({min(part):.3f} to {max(part):.3f})" for part in zip(*told, strict=True)]
        table.append([epsilon, *means, str(len(own))])
    header = ["ε", "LiRA: AUC", "TPR at 5 % FPR", "loss alone: AUC", "loss of training rows", "models"]
    return markdown_table(Table(header, table))


def _told(lines: Sequence[dict[str, Any]], number: int) -> tuple[float, ...]:
    """One model in question, the others its shadows."""
    job = lines[number]["job"]
    trained = halves(job["models"], job["rows"], job["seed"])[[line["job"]["number"] for line in lines]]
    nll = np.array([line["nll"] for line in lines])
    others = np.arange(len(lines)) != number
    scores, inside = lira(confidence(nll[number]), confidence(nll[others]), trained[others]), trained[number]
    by_lira = measure_attack(scores[inside], scores[~inside], Bootstrap(1))
    by_loss = measure_attack(-nll[number][inside], -nll[number][~inside], Bootstrap(1))
    figures = (by_lira.auc.value, by_lira.tpr_5.value, by_loss.auc.value, float(nll[number][inside].mean()))
    return tuple(float(figure or 0.0) for figure in figures)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epsilons", default="none,100,8,1", help="ε of the trainings, at δ = 1e-5; none for one that is not private")
    add("--models", type=int, default=16, help="models of each ε, an even number")
    add("--rows", type=int, default=128, help="candidate rows, of which each model sees half")
    add("--steps", type=int, default=60, help="steps of a training")
    add("--batch", type=int, default=16, help="rows in a step, on average where they are drawn one by one")
    add("--lr", type=float, default=1e-2, help="peak learning rate")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--seed", type=int, default=0, help="of rows and halves")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "lira_epsilon.jsonl")
    add("--report", type=Path, metavar="FILE", help="print the table of these results, and train nothing")
    args = parser.parse_args(argv)
    if args.models < 4 or args.models % 2:
        parser.error("--models must be an even number of 4 or more: they come in pairs of complementary halves")
    return args


if __name__ == "__main__":
    sys.exit(main())
