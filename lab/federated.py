"""Quality of a base with the merged returns of several data owners, beside one owner with all rows.

    python -m lab.federated --task options --data FOLDER --owners 1,2,4,8 --seeds 0,1,2 --out FILE
    python -m lab.federated --report FILE

Every owner has rows of its own: of tasks that nobody else has, or, where there are more owners than tasks, a shard of
one. The tasks are the four files of option texts (`--task options`: ARC-Easy, ARC-Challenge, BoolQ, OpenBookQA), or
the four kinds of arithmetic (`--task arithmetic`). In a round every owner passes over its rows as often as a single
owner would over all, so that all together take as many steps. The mean of the returns' updates is put into the base.
The second round's kit is made of the plugged model. Measured on held-out rows of all tasks, after every round: nats per
label token, and multiple choice. A finished job adds a line of JSON to FILE, and one that is there already is not made
again. With `--work`, kits and trainings outlive an interrupted run.

Recorded lines have more: a bad return, which is the last owner's update reversed (`flipped`) or one of random numbers
(`random`), ten times as long; and mergings other than the mean, which siftune no longer has. `trimmed` is the mean
without the largest and the smallest update of every element, and `clipped` that of updates no longer than their median.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from lab.lines import append, key, read
from lab.offsite import text_batches
from siftune.base.environment import hardware, versions
from siftune.cli.demo_rows import arithmetic_rows
from siftune.data.rows import rows_from
from siftune.evaluate.bootstrap import Bootstrap, resample
from siftune.models.load import load_model
from siftune.offsite.audits.members import AuditRows, score_rows, tokenize_audit
from siftune.offsite.audits.settings import AuditSettings
from siftune.offsite.emulator.plan import EmulatorSettings
from siftune.offsite.exchange.emulate import emulate
from siftune.offsite.exchange.plug import plug_in
from siftune.offsite.exchange.returned import open_return
from siftune.offsite.exchange.tune import source_of
from siftune.offsite.kit.folder import Kit, read_kit
from siftune.recipe.schema import Recipe
from siftune.report.table import Table, markdown_table
from siftune.train.run import train

Job = dict[str, Any]
Line = dict[str, Any]
Records = list[dict[str, Any]]

FILES = ("ARC-Easy", "ARC-Challenge", "boolq", "openbookqa")
PLAIN = {"merge": "mean", "bad": None, "bad_size": None}  # in every new job, as recorded lines have other values too
NO_LIMIT = 1e6  # on updates: what merging holds back is what is measured, not what plug refuses
QUESTIONS = 32  # in a forward pass


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, or print the report; return the exit code."""
    args = _parse(argv)
    if args.report:
        print(report(read(args.report)))
        return 0
    done = {key(line["job"]) for line in read(args.out)}
    with tempfile.TemporaryDirectory(prefix="siftune-federated-") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for job in (job for job in _jobs(args) if key(job) not in done):
            started = time.monotonic()
            rounds = _measure(job, args, work)
            facts = {"versions": versions(), "hardware": hardware(), "seconds": time.monotonic() - started}
            append(args.out, {"job": job, "rounds": rounds, "facts": facts})
            shown = [round(found["nll"], 3) for found in rounds]
            print(f"{job['owners']} owners, seed {job['seed']}: {shown}", flush=True)
    return 0


def place(work: Path, job: Job, shared_by: Sequence[str] = ()) -> Path:
    """Where a job keeps its files, together with jobs that differ in some values alone."""
    rest = {name: value for name, value in job.items() if name not in shared_by}
    return work / hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _measure(job: Job, args: argparse.Namespace, work: Path) -> list[Line]:
    """Scores before the first round and after each."""
    model, tokenizer = load_model(job["model"], args.dtype)
    tasks, held_out = _rows(job, args.data)
    shards = _shards(tasks, job["owners"])
    settings = AuditSettings(template=job["template"], seed=job["seed"])
    rows = tokenize_audit(rows_from(shards[0]), rows_from(held_out), tokenizer, settings)
    shared = place(work, job, ("rounds", "owners"))
    shared.mkdir(exist_ok=True)
    first, before_any = shared / "kit", shared / "before.json"
    if not before_any.exists():
        before_any.write_text(json.dumps(_scores(model, rows)), encoding="utf-8")
    found = [json.loads(before_any.read_text(encoding="utf-8"))]
    calibration = random.Random(job["seed"]).sample([row for part in tasks for row in part], job["calibration"])
    batches = text_batches(rows_from(calibration), 128, tokenizer, job["template"])
    if not first.exists():
        emulate(model, tokenizer, batches, first, EmulatorSettings(keep=job["keep"], allot="uniform"))
    kit = read_kit(first)
    for number in range(1, job["rounds"] + 1):
        folder = place(work, job, ("rounds",) if number == 1 else ())
        parts = _round(job, model, kit, shards, folder / f"round{number}")
        found.append({**_scores(model, rows), "returns": parts})
        if number < job["rounds"]:
            later = place(work, job) / f"kit{number + 1}"
            shutil.rmtree(later, ignore_errors=True)  # of a job that was cut
            kit = emulate(model, tokenizer, batches, later, EmulatorSettings(keep=job["keep"], allot="uniform"))
    return found


def _round(job: Job, model: PreTrainedModel, kit: Kit, shards: Sequence[Records], folder: Path) -> list[Line]:
    """Every owner tunes the kit; what they return is merged into the model."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        returns: list[Mapping[str, Tensor]] = []
        for number, shard in enumerate(shards):
            if not (folder / str(number) / "return").exists():
                shutil.rmtree(folder / str(number), ignore_errors=True)  # of a job that was cut
                _train(job, kit, shard, folder / str(number))
            returns.append(stack.enter_context(open_return(folder / str(number) / "return", kit)))
        report = plug_in(model, kit, returns, NO_LIMIT)
    kept = ("update", "cosine", "largest")
    return [{name: value for name, value in part.to_dict().items() if name in kept} for part in report.parts]


def _train(job: Job, kit: Kit, shard: Records, out: Path) -> None:
    """One owner's training, as `siftune train` does it."""
    path = out.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in shard), encoding="utf-8")
    steps = max(1, round(job["epochs"] * len(shard) / job["batch"]))
    rank = None if job["adapter"] == "full" else job["rank"]
    recipe = Recipe(
        model=str(kit.path), train=str(path), out=str(out), method="dense", adapter=job["adapter"], rank=rank,
        steps=steps, lr=job["lr"], batch_size=job["batch"], seed=job["seed"], template=job["template"], log_every=steps,
    )  # fmt: skip
    train(recipe, Console(quiet=True), source_of)


def _shards(tasks: Sequence[Records], owners: int) -> list[Records]:
    """The rows of every owner: complete tasks, or a shard of one if there are more owners than tasks."""
    if owners <= len(tasks):
        return [[row for task in tasks[owner::owners] for row in task] for owner in range(owners)]
    count = len(tasks)
    return [tasks[o % count][o // count :: len(range(o % count, owners, count))] for o in range(owners)]


def _rows(job: Job, data: Path | None) -> tuple[list[Records], Records]:
    """Training rows task by task, as many of each, and held-out rows of all of them."""
    if job["task"] == "arithmetic":
        test = arithmetic_rows(job["questions"], job["seed"])
        train_rows = arithmetic_rows(job["rows"], job["seed"] + 1, exclude=test)
        kinds = dict.fromkeys(row["kind"] for row in train_rows)
        return [[row for row in train_rows if row["kind"] == kind] for kind in sorted(kinds)], test
    from lab.pays.pool import read_options

    assert data is not None
    drawn = random.Random(job["seed"])
    parts = {part: [read_options(data / f"{name}.{part}.json", name) for name in FILES] for part in ("train", "test")}
    counts = {"train": job["rows"] // len(FILES), "test": job["questions"] // len(FILES)}
    some = {part: [drawn.sample(rows, counts[part]) for rows in tasks] for part, tasks in parts.items()}
    return some["train"], [row for rows in some["test"] for row in rows]


def _scores(model: PreTrainedModel, rows: AuditRows) -> Line:
    scores = score_rows(model, rows, QUESTIONS)
    correct = None if scores.correct is None else scores.correct.astype(int).tolist()
    return {
        "nll": float(scores.nll.sum() / scores.tokens.sum()),
        "accuracy": None if scores.correct is None else float(scores.correct.mean()),
        "rows": {"nll": scores.nll.round(5).tolist(), "tokens": scores.tokens.astype(int).tolist(), "correct": correct},
    }


_WAY = ("owners", "merge", "bad", "rounds")


def report(lines: Sequence[Line]) -> str:
    """A Markdown table; each beside one owner with all rows, questions of all seeds pooled."""
    ways = {json.dumps([line["job"][name] for name in _WAY]): None for line in lines}
    rows = [row for way in ways for row in _rows_of(json.loads(way), lines)]
    header = ["owners", "merging", "bad return", "round", "nats per token", "− one owner", "correct", "seeds"]
    return markdown_table(Table(header, rows, words=(1, 2)))


def _rows_of(way: Sequence[Any], lines: Sequence[Line]) -> Iterator[list[str]]:
    owners, merge, bad, rounds = way
    most = sorted((line for line in lines if line["job"]["owners"] == 1), key=lambda line: line["job"]["rounds"])
    alone = {line["job"]["seed"]: line for line in most if line["job"]["rounds"] >= rounds}
    runs = [line for line in lines if [line["job"][name] for name in _WAY] == list(way)]
    for number in range(0 if owners == 1 else 1, len(runs[0]["rounds"])):
        found = [run["rounds"][number] for run in runs]
        right = [one["accuracy"] for one in found if one["accuracy"] is not None]
        pairs = [
            (run["rounds"][number], alone[s]["rounds"][number]) for run in runs if (s := run["job"]["seed"]) in alone
        ]
        yield [
            str(owners), merge if owners > 1 else "", bad or "", f"{number} of {rounds}",
            f"{mean(one['nll'] for one in found):.3f}", _difference(pairs) if owners > 1 and pairs else "",
            f"{mean(right):.1%}" if right else "", str(len(runs)),
        ]  # fmt: skip


def _difference(pairs: Sequence[tuple[Line, Line]]) -> str:
    """Nats per token above those of one owner, with an interval over questions."""
    names = ("several", "one")
    nll = {name: np.concatenate([pair[at]["rows"]["nll"] for pair in pairs]) for at, name in enumerate(names)}
    tokens = np.concatenate([np.array(pair[0]["rows"]["tokens"], float) for pair in pairs])
    found = resample(nll, tokens, Bootstrap(4000)).difference("several", "one")
    if found.value is None or found.low is None or found.high is None:
        return "–"
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    """All jobs: one owner first, then several."""
    names = ("task", "model", "rows", "questions", "epochs", "lr", "batch", "adapter", "rank", "rounds", "keep")
    common = {name: getattr(args, name) for name in (*names, "calibration", "template")}
    for seed in map(int, args.seeds.split(",")):
        for owners in sorted(map(int, args.owners.split(","))):
            yield {**common, "seed": seed, "owners": owners, **PLAIN}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=("options", "arithmetic"), default="options", help="what the owners' rows are of")
    add("--data", type=Path, help="folder of the option files, for --task options")
    add("--model", default="smollm2", help="base model")
    add("--dtype", default="auto", help="number format of the base")
    add("--owners", default="1,2,4,8", help="how many owners; 1 is the one with all rows")
    add("--rows", type=int, default=1600, help="training rows of all owners together")
    add("--questions", type=int, default=400, help="held-out rows of all tasks together")
    add("--epochs", type=float, default=1.0, help="passes over an owner's rows in a round")
    add("--rounds", type=int, default=2, help="rounds")
    add("--lr", type=float, default=5e-4, help="peak learning rate")
    add("--batch", type=int, default=16, help="rows in a step")
    add("--adapter", choices=("lora", "full"), default="lora", help="what the owners train")
    add("--rank", type=int, default=32, help="of LoRA")
    add("--keep", type=float, default=0.7, help="kept fraction of the middle's matrices")
    add("--calibration", type=int, default=64, help="rows that the kit is calibrated on, of all tasks")
    add("--template", choices=("auto", "chat", "none"), default="none", help="chat template of all rows")
    add("--seeds", default="0", help="of rows and training")
    add("--threads", type=int, default=torch.get_num_threads(), help="processor threads")
    add(
        "--work", type=Path, metavar="FOLDER", help="for kits and returns, to resume with; a temporary one if not given"
    )
    add("--out", type=Path, default=Path(__file__).parent / "results" / "federated.jsonl")
    add("--report", type=Path, metavar="FILE", help="print the table of these results, and measure nothing")
    args = parser.parse_args(argv)
    if not args.report and args.task == "options" and args.data is None:
        parser.error("--task options needs --data")
    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    sys.exit(main())
