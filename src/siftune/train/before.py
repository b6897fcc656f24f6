"""What is said of a run before it begins: its rows, what trains, and how many steps it has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute
from datasets import Dataset
from peft import PeftModel

from siftune.base.words import counted
from siftune.data.rows import WEIGHT, Row, said
from siftune.models.loss import IGNORED
from siftune.recipe.schema import Recipe
from siftune.train.build import Built
from siftune.train.plan import planned_steps, steps_in_words
from siftune.train.prepare import Prepared

_NAMED = 5  # bad rows that are named; the run folder has all


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows of a part."""

    mean: float  # of a row
    longest: int  # of the longest row
    learned: float  # of a row, those that are learned, on average


def lengths_of(data: Dataset) -> Lengths:
    """Look at tokenised rows."""
    lengths = row_lengths(data)
    labels = data.data.column("labels")
    learned = sum(
        pyarrow.compute.sum(pyarrow.compute.not_equal(chunk.flatten(), IGNORED)).as_py() or 0 for chunk in labels.chunks
    )
    return Lengths(float(lengths.mean()), int(lengths.max()), learned / len(data))


def row_lengths(data: Dataset) -> npt.NDArray[np.int32]:
    """Tokens of each row; (rows,) int32."""
    found: npt.NDArray[np.int32] = data.data.column("length").to_numpy()
    return found


def trainable(built: Built) -> tuple[int, int]:
    """Parameters that train, and all of them."""
    model = built.trainer.model
    if isinstance(model, PeftModel):  # it knows that two parameters of 4 bits lie in a byte
        train, total = model.get_nb_trainable_parameters()
        return int(train), int(total)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def short_form(recipe: Recipe, prepared: Prepared, built: Built, folder: Path) -> str:
    """Say in a few lines what a run is about to do, and in which folder."""
    rows = len(prepared.data["train"])
    steps = planned_steps(built.trainer.args, rows)
    train, total = trainable(built)
    lines = [
        f"{recipe.model}: run folder {folder}",
        rows_line(recipe, prepared),
        f"{counted(train, 'parameter')} of {total:,} train, in {counted(built.depth, 'layer')}; "
        f"{steps_in_words(steps, recipe.batch_size * recipe.accumulate, rows)}",
    ]
    return "\n".join([*bad_lines(prepared, _NAMED), *lines])


def rows_line(recipe: Recipe, prepared: Prepared) -> str:
    """Say how many rows there are, and how long they are."""
    data, held = prepared.data["train"], prepared.data.get("eval")
    seen = lengths_of(data)
    out = "" if held is None else f", {counted(len(held), 'row')} held out{_trained_too(prepared)}"
    return (
        f"{counted(len(data), 'row')} to train on{out}: {seen.mean:.0f} tokens on average, {seen.learned:.0f} of them "
        f"learned, the longest {seen.longest}{_cut(recipe, prepared)}{_weights(data)}"
    )


def trained_and_held_out(rows: Mapping[str, Sequence[Row]]) -> int:
    """How many of the held-out rows say what a training row says, so that their loss tells little."""
    trained = set(said(rows["train"]))
    return sum(words in trained for words in said(rows.get("eval", ())))


def _trained_too(prepared: Prepared) -> str:
    count = trained_and_held_out(prepared.rows)
    return f" ({count:,} of them trained on, too, so that the held-out loss flatters)" if count else ""


def bad_lines(prepared: Prepared, most: int, stops: bool = False) -> list[str]:
    """Say which rows are left out, or would stop a run, naming so many of them at the most."""
    if not prepared.bad:
        return []
    more = len(prepared.bad) - most
    rest = [f"  … and {more} more"] if more > 0 else []
    how = "cannot be used, for which a run stops; --bad-rows drop leaves them out" if stops else "left out"
    return [f"{counted(len(prepared.bad), 'row')} {how}:", *(f"  {reason}" for reason in prepared.bad[:most]), *rest]


def _cut(recipe: Recipe, prepared: Prepared) -> str:
    cut = sum(prepared.cut.values())
    return f"; {counted(cut, 'row')} cut at --max-length {recipe.max_length}" if cut else ""


def _weights(data: Dataset) -> str:
    if WEIGHT not in data.column_names:
        return ""
    weights = Counter(data[WEIGHT])
    zeros = f", {weights[0.0]} of them 0, which teach nothing" if weights[0.0] else ""
    return f"; weights go from {min(weights):g} to {max(weights):g}{zeros}"
