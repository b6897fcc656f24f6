"""Result of a dry run as text for a terminal."""

from rich.text import Text

from siftune.base.text import counted, visible
from siftune.train.dry_run import DryRun, Example
from siftune.train.prepare import bad_lines, rows_line, steps_text

_MOST = 600  # characters of a part of a row; the middle of a longer one is left out


def shown(trial: DryRun) -> Text:
    """Bad rows, row lengths, the loss mask of three rows, trainable parameters and memory."""
    size, recipe = trial.size, trial.recipe
    per_step, rows = recipe.batch_size * recipe.accumulate, len(trial.prepared.data["train"])
    return Text("\n").join(
        [
            *map(Text, bad_lines(trial.prepared, len(trial.prepared.bad), recipe.bad_rows == "stop")),
            Text(rows_line(recipe, trial.prepared)),
            *(_example(one) for one in trial.examples),
            Text(
                f"{counted(size.trainable, 'parameter')} of {size.parameters:,} train, in "
                f"{counted(size.layers, 'layer')}; {steps_text(size.steps, per_step, rows)}"
            ),
            Text(_memory(size.memory_mb)),
        ]
    )


def _memory(megabytes: float | None) -> str:
    if megabytes is None:
        return "memory is not measured: a private run draws its rows at random"
    return f"{megabytes:,.0f} MB peak memory in a step of the longest rows, on this machine"


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
