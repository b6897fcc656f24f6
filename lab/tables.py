"""Generate the tables of the recorded runs: results/NAME.md from results/NAME.jsonl.

python -m lab.tables                # all of them
python -m lab.tables pays rows      # these
python -m lab.tables --check        # compare with the committed tables, and write nothing
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab import gast_cost, lira_epsilon, offsite
from lab.avoid import report as avoid
from lab.keep import report as keep
from lab.lines import key, read
from lab.pays import report as pays
from lab.pays import scores
from lab.pays.pool import FILES, QUESTIONS
from lab.recorded import COMMANDS, NOTES
from lab.rows import report as rows
from lab.seeds import seed_means
from siftune.report.table import Table, markdown_table

RESULTS = Path(__file__).parent / "results"


def _costs(path: Path) -> str:
    """Costs of methods, against the first of each file."""
    results = gast_cost.recorded(path)
    reference = results[0][1][0].method
    return "\n".join([*gast_cost.table(results, reference), "", *gast_cost.pooled(results, reference)])


def _quality(path: Path) -> str:
    """Correct answers in per cent, and differences to `dense` at the same rate, over seeds and questions."""
    runs: dict[tuple[float, str], dict[int, list[float]]] = {}
    for line in read(path):
        job = line["job"]
        answers = [100.0 * right for right in line["correct"]["exact_match"]]
        runs.setdefault((job["noise"], job["method"]), {})[job["seed"]] = answers
    rows = []
    for (noise, method), by_seed in sorted(runs.items()):
        ours = [by_seed[seed] for seed in sorted(by_seed)]
        correct = sum(map(sum, ours)) / sum(map(len, ours))
        row = [f"{100 * noise:.0f} %", method, f"{correct:.1f}"]
        rate = "".join(method.partition(" lr ")[1:])
        if method != f"dense{rate}":
            by_seed = runs[noise, f"dense{rate}"]
            dense = [by_seed[seed] for seed in sorted(by_seed)]
            values, weights = {"ours": ours, "dense": dense}, [[1.0] * len(answers) for answers in ours]
            change = seed_means(values, weights).difference("ours", "dense")
            row.append(f"{change.value:+.1f} [{change.low:+.1f}, {change.high:+.1f}]")
        rows.append(row + [""] * (4 - len(row)))
    return markdown_table(Table(["wrong labels", "method", "correct, %", "− dense"], rows))


def _pays(path: Path) -> str:
    """Each scenario at the learning rate of its main table, then the cells that ran at several."""
    lines, rates = read(path), {"S1": 5e-4, "S2": 1e-3, "S3": 5e-4, "S5": 1e-3}
    one_rate = [line for line in lines if line["job"]["lr"] == rates[line["job"]["scenario"]]]
    parts = ["# At one learning rate", pays.report(one_rate)]
    for name in ("dense+known-weighted", "late-known"):
        parts.append(f"# Differences to {name}\n\n{pays.differences(one_rate, name)}")
    place = {key(line["job"]["cell"]) for line in lines if line not in one_rate}
    several = [line for line in lines if key(line["job"]["cell"]) in place]
    return "\n\n".join([*parts, "# At the best of several learning rates", pays.report(several)])


def _private(path: Path) -> str:
    """Private runs beside Opacus', each method at its best rate."""
    lines = read(path)
    parts = [pays.report(lines)]
    for name in ("opacus", "opacus-2"):
        parts.append(f"# Differences to {name}\n\n{pays.differences(lines, name)}")
    return "\n\n".join(parts)


def _natural(path: Path) -> str:
    """All cells, those of intents as one, the differences to a user's first baseline and to longer trainings, rates."""
    every = read(path)
    lines = [line for line in every if line["job"]["lr"] == 5e-4]
    parts = [pays.report(lines)]
    intents = [_of_one_cell(line, "intents") for line in lines if _is_plain_intents(line["job"])]
    parts.append("# All intents: a run of a pool and a seed counts as a seed")
    parts += [pays.differences(intents, name) for name in ("few", "target", "target, 210 steps", "sifted-base")]
    for name in ("few", "retrieved", "retrieved, float32", "target, float32", "target, 210 steps"):
        parts.append(f"# Differences to {name}\n\n{pays.differences(lines, name)}")
    cells = {key([line["job"]["cell"], line["job"]["model"]]) for line in every if line not in lines}
    rates = [line for line in every if key([line["job"]["cell"], line["job"]["model"]]) in cells]
    parts += ["# At the best of several learning rates", pays.report(rates), pays.differences(rates, "few")]
    best = _at_best_rates([line for line in every if _is_plain_intents(line["job"])])
    parts.append("# Intents, each method at the best of its rates that ran in all pools with all seeds")
    parts += [pays.report(best), pays.differences(best, "few")]
    return "\n\n".join(parts)


def _at_best_rates(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of each method at one rate for all pools, a run of a pool and a seed counting as a seed."""
    runs: dict[str, dict[float, dict[Any, dict[str, Any]]]] = {}
    for line in lines:
        job = line["job"]
        rates = runs.setdefault(key([job["method"], job["steps"]]), {})
        rates.setdefault(job["lr"], {})[job["cell"]["name"], job["seed"]] = line
    return [line for rates in runs.values() for line in rates[pays.best_rate(rates)].values()]


def _planted(path: Path) -> str:
    """Cells with planted errors, and the differences to a user's baselines."""
    lines = read(path)
    differences = [f"# Differences to {name}\n\n{pays.differences(lines, name)}" for name in ("few", "target")]
    return "\n\n".join([pays.report(lines), *differences])


def _is_plain_intents(job: dict[str, Any]) -> bool:
    """Whether a job is of the usual model and length, with 100 known rows."""
    name, known, method = job["cell"]["name"], job["cell"]["known"], job["method"]["name"]
    steps = {"few": (90,), "target": (90, 210), "sifted": (45,), "sifted-base": (90,)}.get(method, ())
    return job["model"] == "smollm2" and known == 100 and name.startswith("intents-") and job["steps"] in steps


_OF_LETTERS = ("dense, lr 0.0002", "outer, lr 0.0005")


def _letters(path: Path) -> str:
    """Questions of all tasks together, then of each task that is answered by a letter."""
    lines = [part for line in read(path) for part in _with_emulator(line)]
    parts = [pays.report(lines)]
    each = [_named(line, f"{line['job']['method']['name']}, lr {line['job']['lr']:g}") for line in lines]
    parts += [f"# Each rate: differences to {name}\n\n{pays.differences(each, name)}" for name in _OF_LETTERS]
    for number, task in enumerate(FILES["letters"]):
        by_letter = [line for line in lines if line["job"]["cell"]["target"] == "letters"]
        parts.append(pays.report([_of_task(line, number, task) for line in by_letter]))
    return "\n\n".join(parts)


def _with_emulator(line: dict[str, Any]) -> list[dict[str, Any]]:
    """A line, and one for the emulator that was tuned, if there is one."""
    if "emulator" not in line:
        return [line]
    return [line, _named({**line, **line["emulator"]}, f"{line['job']['method']['name']}, the emulator")]


def _named(line: dict[str, Any], name: str) -> dict[str, Any]:
    """A line whose method has another name."""
    job = line["job"]
    return {**line, "job": {**job, "method": {**job["method"], "name": name}}}


def _of_task(line: dict[str, Any], number: int, task: str) -> dict[str, Any]:
    """A line with the questions of one task, which are in the order of the tasks."""
    own = slice(number * QUESTIONS, (number + 1) * QUESTIONS)
    cell = {**line["job"]["cell"], "name": task}
    answers = {name: line[name][own] for name in ("right", "nll", "tokens")}
    return {**line, **answers, "job": {**line["job"], "cell": cell}}


def _of_one_cell(line: dict[str, Any], name: str) -> dict[str, Any]:
    """A line as of a cell that has the runs of several."""
    job = line["job"]
    cell = {**job["cell"], "name": name}
    return {**line, "job": {**job, "cell": cell, "seed": f"{job['cell']['name']} {job['seed']}"}}


def _printed(path: Path) -> str:
    """Tables that a command printed."""
    record = json.loads(path.read_text(encoding="utf-8"))
    tables = [f"## {one['title']}\n\n{markdown_table(Table(one['header'], one['rows']))}" for one in record["tables"]]
    return "\n\n".join([*tables, "\n".join(record["notes"])])


_OFFSITE = (
    "offsite.jsonl", "offsite_chat.jsonl", "offsite_default.jsonl", "offsite_forms.jsonl",
    "offsite_gemma_default.jsonl", "offsite_gemma_low.jsonl", "offsite_gemma_outer.jsonl", "offsite_gemma_rates.jsonl",
    "offsite_outer.jsonl", "offsite_own.jsonl", "offsite_rates.jsonl",
)  # fmt: skip
TABLES: dict[str, Callable[[Path], str]] = {
    "audit.json": _printed,
    "avoid.jsonl": lambda path: avoid.report(read(path)),
    "bench.json": _printed,
    "calibration_leak.json": _printed,
    "commonsense_qwen.json": _printed,
    "dp_cost.jsonl": _costs,
    "gast_cost.jsonl": _costs,
    "gast_cost_averaged.jsonl": _costs,
    "gast_cost_epyc.jsonl": _costs,
    "keep.jsonl": lambda path: keep.report(read(path)),
    "keep_epyc.jsonl": lambda path: keep.report(read(path)),
    "letters.jsonl": _letters,
    "natural.jsonl": _natural,
    "lira_epsilon.jsonl": lambda path: lira_epsilon.report(read(path)),
    **dict.fromkeys(_OFFSITE, lambda path: offsite.report(read(path))),
    "pays.jsonl": _pays,
    "planted.jsonl": _planted,
    "private.jsonl": _private,
    "quality.jsonl": _quality,
    "rows.jsonl": lambda path: rows.report(read(path)),
    "scores.json": _printed,
    "sift_scores.jsonl": lambda path: scores.report(read(path)),
}


def _header(file: str) -> str:
    """Source of a table, a note on it, and the commands that record it."""
    source = f"Generated from {file} by `python -m lab.tables {Path(file).stem}`."
    about = " ".join(part for part in (source, NOTES.get(file)) if part)
    commands = COMMANDS.get(file, "").strip()
    return f"{about}\n\n```sh\n{commands}\n```" if commands else about


def main(argv: list[str] | None = None) -> int:
    """Write tables, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of results, such as pays; all by default")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a committed table differs")
    args = parser.parse_args(argv)
    files = {Path(file).stem: file for file in TABLES}
    unknown = [name for name in args.names if name not in files]
    if unknown:
        parser.error(f"there are no results {unknown[0]}; there are {', '.join(files)}")
    stale = []
    for name in args.names or files:
        path = (RESULTS / files[name]).with_suffix(".md")
        table = TABLES[files[name]](RESULTS / files[name])
        text = f"{_header(files[name])}\n\n{table}\n"
        if not args.check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"tables differ from their results: {', '.join(stale)}; run `python -m lab.tables`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
