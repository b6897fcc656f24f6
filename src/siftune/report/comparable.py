"""Which runs can be compared: those that were measured on the same held-out rows, tokenised in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass

from siftune.evaluate.measure import PERPLEXITY, MetricRow
from siftune.recipe.schema import Recipe
from siftune.report.subjects import RunData
from siftune.report.words import NBSP, listed

_FIRST = ("exact_match", "choices", "choices_per_token", PERPLEXITY)  # the most informative metric comes first


@dataclass(frozen=True)
class Basis:
    """The measure by which runs are compared.

    Attributes:
        runs: The runs that it applies to; others are measured on other rows, or not at all.
        data: Held-out rows; empty for the held-out losses of training.
        metric: Its name; empty for a loss.
        rows: What measurements on these rows have in common: see `Eval.same`.
    """

    runs: tuple[RunData, ...] = ()
    data: str = ""
    metric: str = ""
    rows: tuple[str, int] = ("", 0)


def basis_of(runs: Sequence[RunData]) -> Basis:
    """The rows and the metric that most runs are measured by; of several the newest rows, and the first of `_FIRST`.

    Perplexities are of the same tokens.
    """
    best = Basis()
    for run in runs:
        for one in reversed(run.evals):
            for metric in _FIRST:
                members = tuple(
                    each
                    for each in runs
                    if (metric != PERPLEXITY or _tokens(each.recipe) == _tokens(run.recipe))
                    and any(of.same == one.same and metric in {row.metric for row in of.metrics} for of in each.evals)
                )
                if len(members) > len(best.runs):
                    best = Basis(members, one.data, metric, one.same)
    if len(best.runs) == 1 < len(runs) or all(measured(run, best).tuned is None for run in best.runs):
        return _by_loss(runs)
    return best


def _by_loss(runs: Sequence[RunData]) -> Basis:
    """The runs that held out the same tokens in the same batches: the largest group of several."""
    groups: dict[tuple[object, ...], list[RunData]] = {}
    for run in runs:
        if run.figure("eval_loss") is not None:
            groups.setdefault(_held_out(run.recipe), []).append(run)
    largest = max(groups.values(), key=len, default=[])
    return Basis(tuple(largest) if len(largest) > 1 else ())


def others_text(runs: Sequence[RunData], basis: Basis) -> str:
    """A sentence on the runs that are not compared; empty if there are none."""
    others = [f"“{run.name}”" for run in runs if run not in basis.runs]
    if not others:
        return ""
    verb = "is" if len(others) == 1 else "are"
    return f"{listed(others)} {verb} not compared: not measured on the same held-out rows."


def measured(run: RunData, basis: Basis) -> MetricRow:
    """The measurement by which a run is compared."""
    rows = (row for one in run.evals if one.same == basis.rows for row in one.metrics)
    return next(row for row in rows if row.metric == basis.metric)


def level_text(run: RunData, basis: Basis) -> str:
    """Coverage of the intervals of that measurement, as text."""
    return f"{100 * next(one.level for one in run.evals if one.same == basis.rows):g}{NBSP}%"


def _held_out(recipe: Recipe) -> tuple[object, ...]:
    """What decides the held-out loss: a file, or a share of the training rows, their tokens, and the batches."""
    share = ("train", "limit", "eval_share", "drop_rows", "target")
    names = ("eval",) if recipe.eval is not None else share
    how = ("max_length", "completion_only", "batch_size")  # the Trainer's loss is a mean of the batches' means
    return (*(getattr(recipe, name) for name in (*names, *how)), _tokens(recipe))


def _tokens(recipe: Recipe) -> tuple[object, ...]:
    """What decides how rows become tokens."""
    return recipe.model, recipe.columns, recipe.template
