"""How training went: losses, learning rate, time and memory over steps."""

from collections.abc import Sequence

from siftune.report.page.figure import Figure
from siftune.report.page.lines import Chart, Line, line_chart
from siftune.report.page.section import Section
from siftune.report.page.subjects import RunData

# key in metrics.jsonl, title, how it is drawn
_COURSES = (
    ("learning_rate", "Learning rate", Chart("of the schedule", zero=True)),
    ("seconds_per_step", "Time", Chart("seconds per step", zero=True)),
    ("peak_memory_mb", "Memory", Chart("peak so far, 10⁶ bytes", zero=True)),
    ("grad_norm", "Gradient", Chart("norm before clipping", zero=True)),
)
_PRIVATE = (
    "Losses and norms in this section were computed without noise: the promise of differential privacy does not cover "
    "them, so keep this page where the rows may be."
)


def training(runs: Sequence[RunData]) -> Section | None:
    """Losses, rates, times and memory of all runs; None where nothing was logged."""
    if not any(run.metrics for run in runs):
        return None
    figures = _losses(runs) if len(runs) > 1 else [_both_losses(runs[0])]
    figures += [_course(runs, key, title, chart) for key, title, chart in _COURSES]
    if len(runs) == 1:
        figures.append(_course(runs, "tokens_per_second", "Speed", Chart("tokens per second", zero=True)))
    private = any(run.recipe.dp_epsilon is not None for run in runs)
    return Section("training", "How training went", [_PRIVATE] if private else [], figures)


def _both_losses(run: RunData) -> Figure:
    lines = [Line("training", *run.course("loss")), Line("held out", *run.course("eval_loss"), colour=1)]
    return line_chart("loss", "Loss", lines, _LOSS, _note(lines[1:]))


_LOSS = Chart("nats per token")


def _losses(runs: Sequence[RunData]) -> list[Figure]:
    train, held_out = (_lines(runs, key) for key in ("loss", "eval_loss"))
    return [
        line_chart("loss", "Training loss", train, _LOSS),
        line_chart("held-out-loss", "Held-out loss", held_out, _LOSS, _note(held_out)),
    ]


def _note(held_out: Sequence[Line]) -> str:
    """Say what is missing."""
    if not any(line.xs for line in held_out):
        return "Nothing was held out: --eval FILE measures it while a run goes on."
    return ""


def _course(runs: Sequence[RunData], key: str, title: str, chart: Chart) -> Figure:
    lines = _lines(runs, key) if len(runs) > 1 else [Line("", *runs[0].course(key))]
    return line_chart(key.replace("_", "-"), title, lines, chart)


def _lines(runs: Sequence[RunData], key: str) -> list[Line]:
    return [Line(run.name, *run.course(key), colour=number) for number, run in enumerate(runs)]
