"""What the base and the tuned model wrote, side by side; and how both were measured."""

from siftune.evaluate.measure import PERPLEXITY, MetricRow
from siftune.report.evals import Eval
from siftune.report.metrics import label_of
from siftune.report.page.figure import Figure, slug
from siftune.report.page.points import Point, Scale, listed_points
from siftune.report.page.quality import change_text
from siftune.report.page.section import Cell, Grid, Section
from siftune.report.page.subjects import RunData
from siftune.report.page.words import cut, percent, short

_LONG = 600  # letters of a text
_NOTHING = "(nothing)"


def answers(run: RunData, several: bool) -> Section:
    """Base against tuned; words on how to get there where nothing was measured."""
    title = f"Base and tuned{f': {run.name}' if several else ''}"
    anchor = f"answers-{slug(run.name)}"
    if not run.evals:
        return Section(
            anchor, title, [f"Nothing was measured yet: `siftune eval {run.path} --data FILE` puts it here."]
        )
    newest = run.evals[-1]
    words = [f"{newest.rows:,} rows of {newest.data}, the same for both models. Intervals: {100 * newest.level:g} %."]
    if not newest.answers:
        words.append("No texts were generated on these rows, so that there are no answers to compare.")
    tables = [_metrics(newest), *([_texts(newest)] if newest.answers else [])]
    return Section(anchor, title, words, _figures(run, newest), tables)


def _figures(run: RunData, found: Eval) -> list[Figure]:
    """Rates of both models, where there are any."""
    rates = [row for row in found.metrics if row.metric != PERPLEXITY and row.tuned is not None]
    scale, drawn = Scale("share of right answers", percent=True), []
    for row in rates:
        assert row.tuned is not None
        models = (("base", row.base, row.base_interval), ("tuned", row.tuned, row.tuned_interval))
        pair = []
        for number, (name, value, bounds) in enumerate(models):
            low, high = bounds or (None, None)
            pair.append(Point(name, value, low, high, colour=number))
        name, title = f"{slug(row.metric)}-{slug(run.name)}", label_of(row.metric).capitalize()
        drawn.append(listed_points(name, title, pair, scale, size="third"))
    return drawn


def _metrics(found: Eval) -> Grid:
    header = ["metric", "rows", "base", "tuned", "difference", "interval"]
    return Grid(header, [_row(row) for row in found.metrics], "Measured on held-out rows; differences in points.")


def _row(row: MetricRow) -> list[Cell]:
    show = short if row.metric == PERPLEXITY else percent
    low, high = (None if bound is None else change_text(row.metric, bound) for bound in (row.low, row.high))
    return [
        Cell(label_of(row.metric)),
        Cell(f"{row.rows:,}", row.rows),
        Cell(show(row.base), row.base),
        Cell(show(row.tuned), row.tuned),
        Cell("–" if row.difference is None else change_text(row.metric, row.difference), row.difference),
        Cell("–" if low is None or high is None else f"{low} to {high}", row.low),
    ]


def _texts(found: Eval) -> Grid:
    rows = [
        [
            Cell(str(place), place),
            Cell(cut(one.prompt, _LONG)),
            Cell(cut(one.right, _LONG)),
            Cell(_shown(one.base), mark="good" if one.base_right else "bad"),
            Cell(_shown(one.tuned), mark="good" if one.tuned_right else "bad"),
        ]
        for place, one in enumerate(found.answers, 1)
    ]
    caption = f"The first {len(rows)} held-out rows, as they come. ✓ right, ✗ wrong."
    return Grid(["row", "question", "right answer", "base", "tuned"], rows, caption, range(5), cards=True)


def _shown(text: str) -> str:
    return cut(text.strip(), _LONG) or _NOTHING
