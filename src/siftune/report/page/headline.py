"""The result in a sentence, and the commands that repeat it."""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from siftune.base.words import counted
from siftune.evaluate.measure import PERPLEXITY
from siftune.report.metrics import label_of
from siftune.report.page.quality import change_text, held_out_alike, level_text, measured, shared_metric, value_text
from siftune.report.page.sections import audit, bench, kit, rates, reproduction, sweep
from siftune.report.page.subjects import RunData, Subjects
from siftune.report.page.words import listed, short

_SENTENCES: dict[str, Callable[[Any], str]] = {
    "audit": audit.in_a_sentence, "kit": kit.in_a_sentence, "sweep": sweep.in_a_sentence,
    "rates": rates.in_a_sentence, "bench": bench.in_a_sentence, "reproduction": reproduction.in_a_sentence,
}  # fmt: skip


def headline(subjects: Subjects) -> str:
    """What came out, in a sentence."""
    if len(subjects.runs) == 1:
        return _of_run(subjects.runs[0])
    if subjects.runs:
        return _of_runs(subjects.runs)
    other = subjects.others[0]
    return _SENTENCES[other.kind](other.content)


def commands(subjects: Subjects) -> list[str]:
    """What repeats it: for every run the recipe that it left, into another folder."""
    return [
        shlex.join(["siftune", "train", str(run.path / "recipe.yaml"), "--out", f"{run.path}-again"])
        for run in subjects.runs
    ]


def _of_run(run: RunData) -> str:
    shared = shared_metric([run])
    if run.status == "running":
        return _under_way(run)
    if shared is None:
        return _by_loss(run)
    row = measured(run, *shared)
    if row.tuned is None or row.difference is None or row.low is None or row.high is None:
        return _by_loss(run)
    base, tuned = (value_text(row.metric, value) for value in (row.base, row.tuned))
    change, low, high = (change_text(row.metric, value) for value in (row.difference, row.low, row.high))
    unit = "" if row.metric == PERPLEXITY else " points"
    return (
        f"On {counted(row.rows, 'held-out row')}, {label_of(row.metric)} went from {base} to {tuned}: {change}{unit}, "
        f"{level_text(run, shared[0])} interval {low} to {high}."
    )


def _under_way(run: RunData) -> str:
    steps, losses = run.course("loss")
    if not losses:
        return f"“{run.name}” has begun; no step is logged yet."
    total = f" of {run.recipe.steps:,}" if run.recipe.steps else ""
    held_out = run.course("eval_loss")[1]
    told = f", held-out loss {short(held_out[-1], 4)}" if held_out else ""
    return f"“{run.name}” is at step {steps[-1]:,.0f}{total}: training loss {short(losses[-1], 4)}{told}."


def _by_loss(run: RunData) -> str:
    steps = counted(int(run.figure("steps") or 0), "step")
    first, last, held_out = (run.figure(name) for name in ("loss_first", "loss_last", "eval_loss"))
    ended = "" if run.status == "finished" else f" (the run was {run.status})"
    if held_out is not None:
        return f"After {steps} the held-out loss is {short(held_out, 4)} nats per token{ended}."
    if first is None or last is None:
        return f"{steps.capitalize()} were done; no loss was logged{ended}."
    return (
        f"In {steps} the training loss went from {short(first)} to {short(last)}{ended}; nothing was held out, so that "
        "it says little of quality."
    )


def _of_runs(runs: Sequence[RunData]) -> str:
    shared = shared_metric(runs)
    if shared is None:
        return _by_losses(runs)
    data, metric = shared
    found = {run.name: measured(run, data, metric) for run in runs}
    valued = {name: row.tuned for name, row in found.items() if row.tuned is not None}
    if not valued:
        return _by_losses(runs)
    order = sorted(valued, key=lambda name: valued[name], reverse=metric != PERPLEXITY)
    best = found[order[0]]
    others = [f"{value_text(metric, valued[name])} for “{name}”" for name in order[1:4]]
    others.append(f"{value_text(metric, best.base)} for the base model")
    interval = ""
    if best.tuned_interval is not None:
        level = level_text(next(run for run in runs if run.name == order[0]), data)
        low, high = (value_text(metric, bound) for bound in best.tuned_interval)
        interval = f" ({level} interval {low} to {high})"
    return (
        f"“{order[0]}” is best of {len(runs)} runs: {value_text(metric, valued[order[0]])} "
        f"{label_of(metric)}{interval} on {counted(best.rows, 'held-out row')}, "
        f"against {listed(others)}."
    )


def _by_losses(runs: Sequence[RunData]) -> str:
    losses = {run.name: loss for run in runs if (loss := run.figure("eval_loss")) is not None}
    if not held_out_alike(runs) or len(losses) < 2:
        return f"{len(runs)} runs, which were not measured on the same held-out rows."
    order = sorted(losses, key=lambda name: losses[name])
    others = ", ".join(f"{short(losses[name], 4)} for “{name}”" for name in order[1:4])
    return (
        f"“{order[0]}” has the least held-out loss of {len(runs)} runs, {short(losses[order[0]], 4)} nats per token, "
        f"against {others}."
    )
