"""Result of a dry run as text for a terminal."""

from rich.text import Text

from siftune.base.text import counted, duration, visible
from siftune.train.dry_run import DryRun, Example
from siftune.train.prepare import bad_lines, rows_line, steps_text

_MOST = 600  # characters of a part of a row; the middle of a longer one is left out


def shown(found: DryRun) -> Text:
    """Bad rows, row lengths, the loss mask of three rows, trainable parameters, time and memory."""
    known, recipe = found.estimate, found.recipe
    per_step, rows = recipe.batch_size * recipe.accumulate, len(found.prepared.data["train"])
    return Text("\n").join(
        [
            *map(Text, bad_lines(found.prepared, len(found.prepared.bad), recipe.bad_rows == "stop")),
            Text(rows_line(recipe, found.prepared)),
            *(_example(one) for one in found.examples),
            Text(
                f"{counted(known.trainable, 'parameter')} of {known.parameters:,} train, in "
                f"{counted(known.layers, 'layer')}; {steps_text(known.steps, per_step, rows)}"
            ),
            Text(_takes(found)),
        ]
    )


def _takes(found: DryRun) -> str:
    known = found.estimate
    if known.seconds is None or known.memory_mb is None:
        return "no estimate of time and memory: a private run draws its rows at random"
    return (
        f"estimated: {duration(known.seconds)} ± {known.uncertainty or 0:.0%}, {known.memory_mb:,.0f} MB peak memory "
        f"(from {counted(known.tried, 'step')} on this machine)"
    )


def _example(one: Example) -> Text:
    """A row with its labels between « and », and in another colour on a terminal."""
    text = Text(f"{one.place}, labels «marked»:\n")
    for part, learned in one.parts:
        body = visible(part if len(part) <= _MOST else f"{part[: _MOST // 2]} … {part[-_MOST // 2 :]}")
        text.append(f"«{body}»" if learned else body, style="bold green" if learned else "")
    return Text("  ").append(Text.assemble(*_indented(text)))


def _indented(text: Text) -> list[Text]:
    lines = text.split("\n")
    return [line if number == 0 else Text("\n    ").append(line) for number, line in enumerate(lines)]
