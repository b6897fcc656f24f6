"""Which way of selecting rows and layers makes the better model, on a small model and with seeds and intervals?

    python -m lab.quality --task arithmetic --noise 0.3 --methods dense,random,rest --seeds 0,1,2 --out FILE
    python -m lab.quality --methods dense few=method:gast,support:rest,select:0.25 --set lr=1e-3
    python -m lab.quality --report FILE --against "sample 12 of 16"

Each (task, method, seed) is trained on siftune's own training path in a fresh process and measured on held-out rows; a
finished run adds a line of JSON to FILE, and a run that is there already is not made again. All methods take seed 0
first, so that a run cut short compares what it has.

Tasks:
    arithmetic: two-digit arithmetic (`siftune.data.tasks`), `--noise` of whose training rows carry a wrong
        label. By default one pass, `--steps` of `--batch` rows; `--rows 800 --epochs 5` passes over few rows often.
        Measured: answers generated (exact match), multiple choice, and the likelihood of the right answer.
    options: ARC-Easy, ARC-Challenge, OpenBookQA and BoolQ in equal shares, from the folder `--data`, as questions whose
        completions are the texts of the options. Measured: multiple choice and the likelihood of the right option.

The report compares methods question by question, the same questions and the same seed on both sides (paired bootstrap,
pooled over seeds). Its intervals speak for other questions of the task; how much another seed moves a method is seen
from the figures of the seeds.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Line = dict[str, Any]

_REPOSITORY = Path(__file__).resolve().parent.parent
_GAST: dict[str, Any] = {"method": "gast", "select": 0.5}
# name -> options of its recipes; those of a method stand without its name, as in the results
METHODS: dict[str, dict[str, Any]] = {
    "untrained": {"method": "dense", "untrained": True},  # where all others begin
    "dense": {"method": "dense"},
    "dense+support": {"method": "dense", "add_support": True},  # what support dataset sees, as training rows
    "random": {**_GAST, "choice": "random", "support": "rest"},
    "topk": {**_GAST, "choice": "topk", "support": "rest"},
    **{support: {**_GAST, "support": support} for support in ("rest", "sample", "momentum", "dataset")},
    **{
        f"{support}-cosine": {**_GAST, "support": support, "score": "cosine"}
        for support in ("rest", "sample", "dataset")
    },
    "ist": {"method": "ist"},
    "rst": {"method": "rst"},
    "lisa": {"method": "lisa"},
    "greats": {"method": "greats"},
    "ist+gast": {**_GAST, "method": "ist+gast", "support": "rest"},
}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, or print the report; return the exit code."""
    args = _parse(argv)
    if args.report:
        from lab.quality_report import report

        if not args.report.is_file():
            raise SystemExit(f"{args.report} does not exist; give the --out of earlier runs")
        lines = read(args.report)
        names = {line["job"]["method"] for line in lines}
        for name in args.against:
            if name not in names:
                raise SystemExit(f"no run of {args.report} is called {name!r}; there are {', '.join(sorted(names))}")
        print(report(lines, args.metric, args.against))
        return 0
    jobs = list(_jobs(args))
    _check(jobs)
    done = [line["job"] for line in read(args.out)] if args.out.exists() else []
    failed = [job for job in jobs if _plain(job) not in done and not _run(job, args.out)]
    for job in failed:
        print(f"failed: {_name(job)}", file=sys.stderr)
    return 1 if failed else 0


def read(path: Path) -> list[Line]:
    """Read finished runs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=("arithmetic", "options"), default="arithmetic")
    add("--methods", nargs="+", default=["dense,random,rest"], help=f"of {', '.join(METHODS)}; or name=key:value,...")
    add("--seeds", default="0,1,2")
    add("--noise", type=float, default=0.0, help="share of the training rows whose label is wrong")
    add("--steps", type=int, default=150, help="optimizer steps of one pass, where --rows is not given")
    add("--batch", type=int, default=16, help="rows in a batch")
    add("--rows", type=int, help="training rows")
    add("--epochs", type=float, default=1.0, help="passes over the training rows")
    add("--questions", type=int, default=300, help="held-out rows")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe options of all runs, such as lr=1e-3 rank=16")
    add("--data", type=Path, default=Path(), help="folder of the task options")
    add("--out", type=Path, default=_REPOSITORY / "lab" / "results" / "quality.jsonl")
    add("--report", type=Path, metavar="FILE", help="print the tables of these results, and run nothing")
    add("--against", nargs="+", default=[], metavar="METHOD", help="methods that the report compares others with too")
    add(
        "--metric", choices=("exact_match", "choices", "choices_per_token"), help="of the report; by the task if absent"
    )
    return parser.parse_args(argv)


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    """All runs that are asked for, seed by seed."""
    settings = {"lr": 5e-4, "rank": 32, "batch_size": args.batch, "epochs": args.epochs}
    settings |= {key: _value(text) for key, _, text in (pair.partition("=") for pair in args.set)}
    methods = [method for words in args.methods for method in _methods(words)]
    for seed in map(int, args.seeds.split(",")):
        for name, overrides in methods:
            yield {
                "task": args.task,
                "method": name,
                "seed": seed,
                "noise": args.noise,
                "rows": args.rows or args.steps * args.batch,
                "questions": args.questions,
                "settings": settings,
                "overrides": overrides,
                "data": str(args.data),
            }


def _methods(words: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read `dense,rest`, or a variant `name=key:value,key:value`."""
    name, given, options = words.partition("=")
    if given:
        yield name, {key: _value(text) for key, _, text in (pair.partition(":") for pair in options.split(","))}
        return
    for name in words.split(","):
        if name not in METHODS:
            raise SystemExit(f"unknown method {name!r}; use {', '.join(METHODS)}, or name=key:value,key:value")
        yield name, METHODS[name]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a word
        return text


def _check(jobs: list[Job]) -> None:
    """Refuse recipes and data that cannot be used, before hours of training."""
    from lab.quality_tasks import make_task, recipe_of
    from siftune.base.errors import InputError

    try:
        with tempfile.TemporaryDirectory() as folder:
            for job in jobs:
                recipe_of(job, Path(folder))
        make_task(jobs[0])
    except InputError as error:
        raise SystemExit(str(error)) from None


def _plain(job: Job) -> Job:
    """What makes two runs the same: all but where the data lies."""
    return {key: value for key, value in job.items() if key != "data"}


def _name(job: Job) -> str:
    return f"{job['task']} noise {job['noise']:g} {job['method']} seed {job['seed']}"


def _run(job: Job, out: Path) -> bool:
    """Make one run in a process of its own, and record it; False if it failed."""
    started = time.monotonic()
    print(f"{time.strftime('%H:%M:%S')} {_name(job)}", flush=True)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(_work, job).result()
    except Exception as error:  # whatever went wrong in there, the other runs can still be made
        print(f"  {type(error).__name__}: {error}", flush=True)
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"job": _plain(job), **result}) + "\n")
    print(f"  {result['accuracy']} in {time.monotonic() - started:.0f} s", flush=True)
    return True


def _work(job: Job) -> Line:
    """Work of the fresh process."""
    import siftune
    from lab.quality_tasks import run_job

    print(f"  siftune from {Path(siftune.__file__).parent}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        return run_job(job, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
