"""`siftune sift`: the rows of a pool that are like a few correct rows of the task."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic import FiniteFloat
from pydantic.dataclasses import dataclass

from siftune.base.environment import launch_rank
from siftune.base.settings import CONFIG, Count, Positive, Validated
from siftune.base.text import one_line
from siftune.base.work_folder import WorkFolder
from siftune.cli.options import as_flag
from siftune.cli.sources import source_of
from siftune.recipe.schema import SCORING, Recipe, with_settings
from siftune.sifting.checks import RECORD, STEPS, PoolShare, Similarity, check_sifting
from siftune.sifting.choose import Limits

if TYPE_CHECKING:
    from siftune.sifting.sift import Sifted

_MOST = 12  # sources that a message names
_LOWEST = 5  # completions that a message names


@with_settings("limit", *SCORING)
@dataclass(config=CONFIG)
class Options(Validated):
    """Select the rows of a pool that are like a few correct rows of your task, and write them for any trainer.

    Rows with prompts like those of the correct rows are of the task. A model is briefly trained, and rows of the task
    are left out if another row's answer fits their prompt better, or, if each row has an answer of its own, if theirs
    is less likely than those of correct rows. With --avoid, rows like bad ones are left out. The same command continues
    after an interruption. `siftune train --sift` and `siftune train --avoid` do this before training.
    """

    model: str = Recipe.model
    """Model to score with, best the one to fine-tune: a folder, a hub id, smollm2, or a kit."""
    train: str | tuple[str, ...] = Recipe.train
    """The pool: a .jsonl, .json, .csv, .parquet or .txt file, or a hub id; or several, which are concatenated."""
    target: str | None = Recipe.target
    """At least 8 correct rows of the task: a file or hub id. Without it, rows are only left out, by --avoid."""
    avoid: str | None = None
    """At least 8 rows with answers that the model must not give: a file or hub id. Rows like them are left out."""
    share: PoolShare | None = None
    """Rows to select: a share of the pool below 1, or a number. Default: those of the task within the limits."""
    max_score: FiniteFloat | None = None
    """Highest score of a selected row. Default: if rows share answers, 1, but at least two in five rows of each answer
    stay; otherwise by the target's held-out rows."""
    min_similarity: Similarity | None = None
    """Lowest similarity of the prompt of a row of the task. Default: from the target's own prompts."""
    steps: Count = STEPS
    """At most N optimizer steps on the pool and N/2 on the target; without shared answers, N on the target alone."""
    lr: Positive | None = Recipe.lr
    """Peak learning rate of the training on the target's rows. Default: 5e-4."""
    batch_size: Count = Recipe.batch_size
    """Rows per forward pass of the training; one without gradients takes four times as many."""
    out: str | None = Recipe.out
    """Folder to write. Default: runs/DATE-sift."""


# settings that a training on the selected rows does not share
_OWN = ("avoid", "share", "max_score", "min_similarity", "steps", "out")


def run(options: Options) -> dict[str, Any]:
    """Sift, and report what is where."""
    recipe, limits = (
        Recipe(train=options.train, target=options.target),
        Limits(options.max_score, options.min_similarity),
    )
    check_sifting(recipe, options.share, options.avoid, limits)  # this and the folder, before torch is imported
    if options.out is not None:
        WorkFolder(options.out, RECORD).refuse_others()
    from siftune.base.stages import text_console
    from siftune.sifting.sift import sift

    console = text_console(stderr=True)
    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    sifted = sift(**settings, console=console, source_of=source_of)
    if launch_rank():
        return {}
    console.print(text_of(sifted), markup=False)
    console.print(
        f"selected rows in {sifted.rows}, all rows with scores in {sifted.folder / 'scores.csv'}\n"
        f"{_again(options, sifted)}"
        f"look: `siftune report {shlex.quote(str(sifted.folder))}`\n"
        f"next: `{_next(options, sifted)}`",
        markup=False,
    )
    return {
        "folder": sifted.folder,
        "rows": sifted.rows,
        "dropped": sifted.dropped,
        "pool": len(sifted.places),
        "selected": len(sifted.selected),
        "score_limit": sifted.score_limit,
        "similarity_limit": sifted.similarity_limit,
        "shares": sifted.shares,
        "seconds": sifted.seconds,
    }


def _next(options: Options, sifted: "Sifted") -> str:
    """The command that trains on the selected rows, with the settings by which they were scored."""
    from siftune.sifting.tuning import SHAPE

    words = ["siftune", "train"]
    adapter = sifted.adapter and sifted.adapter.parent
    own = (*_OWN, *SHAPE) if adapter else _OWN
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in own and value != field.default:
            words += as_flag(field.name, value)
    for name, path in (("drop-rows", sifted.dropped), ("from-adapter", adapter)):
        words += [] if path is None else [f"--{name}", str(path)]
    return shlex.join(words)


def _again(options: Options, sifted: "Sifted") -> str:
    """How to select again, as a line; empty without a target, which limits and a share refer to."""
    folder = "" if options.out else f"--out {shlex.quote(str(sifted.folder))} and "
    share, limits = ("another --share", "computing"), ("--max-score, --min-similarity or --share", "training")
    other, work = share if options.share else limits  # a lower similarity may reach rows without a loss
    line = f"the same command with {folder}{other} selects again without {work}\n"
    return line if options.target else ""


def text_of(sifted: "Sifted") -> str:
    """The result as text."""
    selected, pool = len(sifted.selected), len(sifted.places)
    what = f"{selected:,} of {pool:,} rows of the pool ({selected / pool:.0%})"
    parts = _shares(sifted.shares)
    shares = [f"selected by source: {', '.join(parts)}"] if 1 < len(parts) <= _MOST else []
    lowest = _shares(dict(sorted(sifted.completions.items(), key=lambda item: item[1])[:_LOWEST]))
    completions = [f"lowest selected shares by completion: {', '.join(lowest)}"] if lowest else []
    reason = f"selected {what} in {sifted.seconds:.0f} s: {sifted.reason}"
    return "\n".join([*sifted.notes, reason, *_limits(sifted), *shares, *completions])


def _limits(sifted: "Sifted") -> list[str]:
    """The limits by which rows were selected, as a line; none with a share or without a target."""
    if sifted.similarity_limit is None:
        return []
    score = "none on the score" if sifted.score_limit is None else f"score at most {sifted.score_limit}"
    return [f"limits: {score}, similarity of the prompt at least {sifted.similarity_limit}"]


def _shares(shares: Mapping[str, float]) -> list[str]:
    return [f"{share:.0%} of {one_line(name)}" for name, share in shares.items()]
