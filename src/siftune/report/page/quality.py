"""By what runs can be compared: the held-out rows and the metric that all of them were measured by."""

from collections.abc import Sequence

from siftune.evaluate.measure import PERPLEXITY, MetricRow
from siftune.recipe.schema import Recipe
from siftune.report.page.subjects import RunData
from siftune.report.page.words import percent, points, short

_FIRST = ("exact_match", "choices", "choices_per_token", PERPLEXITY)  # the metric that tells most comes first


def shared_metric(runs: Sequence[RunData]) -> tuple[str, str] | None:
    """Held-out rows and metric that all runs were measured by; the newest rows, and the metric that tells most."""
    if not all(run.evals for run in runs):
        return None
    for one in reversed(runs[0].evals):
        rows = (one.data, one.rows)
        measured = [
            {row.metric for row in of.metrics} for run in runs for of in run.evals if (of.data, of.rows) == rows
        ]
        if len(measured) == len(runs):
            for metric in _FIRST:
                if all(metric in names for names in measured):
                    return one.data, metric
    return None


def measured(run: RunData, data: str, metric: str) -> MetricRow:
    """What a run has by a metric on held-out rows, where `shared_metric` found them."""
    return next(row for one in run.evals if one.data == data for row in one.metrics if row.metric == metric)


def level_text(run: RunData, data: str) -> str:
    """How sure the intervals of a measurement are, in words."""
    return f"{100 * next(one.level for one in run.evals if one.data == data):g} %"


def held_out_alike(runs: Sequence[RunData]) -> bool:
    """Whether the runs held out the same rows, so that their losses can be compared."""
    return len({_held_out(run.recipe) for run in runs}) == 1


def _held_out(recipe: Recipe) -> tuple[object, ...]:
    """What decides the held-out rows: a file, or a share of the training rows."""
    share = ("train", "train_split", "limit", "eval_share", "drop_rows", "target")
    names = ("eval", "eval_split") if recipe.eval is not None else share
    return tuple(getattr(recipe, name) for name in names)


def value_text(metric: str, value: float) -> str:
    """A metric's value in words."""
    return short(value, 4) if metric == PERPLEXITY else percent(value)


def change_text(metric: str, value: float) -> str:
    """A difference of a metric's values in words: of rates in points."""
    return short(value) if metric == PERPLEXITY else points(value)
