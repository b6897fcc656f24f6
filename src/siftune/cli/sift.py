"""`siftune sift`: the rows of a pool that are like a few correct rows of the task."""

import shlex
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from siftune.base.environment import launch_rank
from siftune.base.settings import CONFIG, AtLeastTwo, Columns, Count, Positive, Seed, Template, Validated
from siftune.base.text import one_line

if TYPE_CHECKING:
    from siftune.sifting.run import Sifted

_MOST = 12  # sources that a message names

PoolShare = Count | Annotated[float, Field(gt=0, lt=1)]


@dataclass(config=CONFIG)
class Options(Validated):
    """Select the rows of a pool that are like a few correct rows of your task, and write them for any trainer.

    Rows with prompts like those of the correct rows are of the task. A short training on the correct rows makes rows
    that contradict them less likely, and these are left out. With --avoid, rows like bad ones are left out. The same
    command continues after an interruption. `siftune train --sift` and `siftune train --avoid` do this before training.
    """

    model: str = "smollm2"
    """Model to score with, best the one to fine-tune: a folder, a hub id, smollm2, or a kit."""
    train: str | tuple[str, ...] = ""
    """The pool: a .jsonl, .json, .csv, .parquet or .txt file, or a hub id; or several, which are concatenated."""
    target: str | None = None
    """At least 8 correct rows of the task: a file or hub id. Without it, rows are only left out, by --avoid."""
    avoid: str | None = None
    """At least 8 rows with answers that the model must not give: a file or hub id. Rows like them are left out."""
    share: PoolShare | None = None
    """Rows to select: a share of the pool below 1, or a number. Default: those of the task without contradiction."""
    steps: Count = 60
    """Optimizer steps of the training on the target's rows."""
    limit: Count | None = None
    """Use at most N rows of each file of the pool."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """Unusable rows: stop and list them, or drop them."""
    columns: Columns = ()
    """Other names of columns, such as prompt=question completion=answer, as for siftune train."""
    template: Template = "auto"
    """Chat template, as for siftune train; use the same there."""
    max_length: AtLeastTwo = 512
    """Maximum length of a row in tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the frozen weights, as for siftune train."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Quantize the frozen weights with bitsandbytes, for less memory."""
    lr: Positive | None = None
    """Peak learning rate of the training on the target's rows. Default: 5e-4."""
    batch_size: Count = 16
    """Rows per training step; a forward pass without gradients takes four times as many."""
    seed: Seed = 0
    """Random seed."""
    out: str | None = None
    """Folder to write. Default: runs/DATE-sift."""


# settings in which a training must not differ from sifting
_NEXT = (
    *("model", "train", "target", "limit", "bad_rows", "columns", "template", "max_length", "dtype"),
    "quantize",
)


def run(options: Options) -> dict[str, Any]:
    """Sift, and report what is where."""
    from siftune.base.stages import text_console
    from siftune.offsite.exchange.tune import source_of
    from siftune.sifting.run import sift

    console = text_console(stderr=True)
    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    sifted = sift(**settings, console=console, source_of=source_of)
    if launch_rank():
        return {}
    console.print(text_of(sifted), markup=False)
    console.print(
        f"selected rows in {sifted.rows}, all rows with scores in {sifted.folder / 'scores.csv'}\n"
        f"next: `{_next(options, sifted)}`",
        markup=False,
    )
    return {
        "folder": sifted.folder,
        "rows": sifted.rows,
        "dropped": sifted.dropped,
        "pool": len(sifted.places),
        "selected": len(sifted.selected),
        "shares": sifted.shares,
        "seconds": sifted.seconds,
    }


def _next(options: Options, sifted: "Sifted") -> str:
    """The command that trains on the selected rows."""
    words = ["siftune", "train"]
    for name in _NEXT:
        value = getattr(options, name)
        if value != getattr(Options, name):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join([*words, *([] if sifted.dropped is None else ["--drop-rows", str(sifted.dropped)])])


def text_of(sifted: "Sifted") -> str:
    """The result as text."""
    selected, pool = len(sifted.selected), len(sifted.places)
    what = f"{selected:,} of {pool:,} rows of the pool ({selected / pool:.0%})"
    parts = [f"{share:.0%} of {one_line(source)}" for source, share in sifted.shares.items()]
    shares = [f"selected by source: {', '.join(parts)}"] if 1 < len(parts) <= _MOST else []
    return "\n".join([*sifted.notes, f"selected {what} in {sifted.seconds:.0f} s: {sifted.reason}", *shares])
