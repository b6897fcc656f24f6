"""What a dry run has found, for a terminal."""

from rich.text import Text

from siftune.base.words import counted, duration, visible
from siftune.train.dry_run import DryRun, Example
from siftune.train.prepare import bad_lines, rows_line, steps_in_words

_MOST = 600  # characters of a part of a row; the middle of a longer one is left out


def shown(found: DryRun) -> Text:
    """All of it: bad rows, rows, what is learned of three of them, what trains, and what it takes."""
    known, recipe = found.forecast, found.recipe
    per_step, rows = recipe.batch_size * recipe.accumulate, len(found.prepared.data["train"])
    return Text("\n").join(
        [
            *map(Text, bad_lines(found.prepared, len(found.prepared.bad), recipe.bad_rows == "stop")),
            Text(rows_line(recipe, found.prepared)),
            *(_example(one) for one in found.examples),
            Text(
                f"{counted(known.trainable, 'parameter')} of {known.parameters:,} train, in "
                f"{counted(known.layers, 'layer')}; {steps_in_words(known.steps, per_step, rows)}"
            ),
            Text(_takes(found)),
        ]
    )


def _takes(found: DryRun) -> str:
    known = found.forecast
    if known.seconds is None or known.memory_mb is None:
        return "time and memory were not tried out: a private run draws its rows by chance"
    return (
        f"estimated: {duration(known.seconds)}, {known.memory_mb:,.0f} MB at the peak (from "
        f"{counted(known.tried, 'step')} that were tried on this machine)"
    )


def _example(one: Example) -> Text:
    """A row, with what is learned between « and », and in another colour where there are colours."""
    text = Text(f"{one.place}, learned «so»:\n")
    for part, learned in one.parts:
        body = visible(part if len(part) <= _MOST else f"{part[: _MOST // 2]} … {part[-_MOST // 2 :]}")
        text.append(f"«{body}»" if learned else body, style="bold green" if learned else "")
    return Text("  ").append(Text.assemble(*_indented(text)))


def _indented(text: Text) -> list[Text]:
    lines = text.split("\n")
    return [line if number == 0 else Text("\n    ").append(line) for number, line in enumerate(lines)]
