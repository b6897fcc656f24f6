"""`siftune rows`: suspect rows of a run, with text and place."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.errors import DataError, RecipeError
from siftune.base.files import refuse_links
from siftune.base.settings import CONFIG, Count, Validated
from siftune.base.text import counted
from siftune.cli.options import Flag
from siftune.cli.sources import source_of


@dataclass(config=CONFIG)
class Options(Validated):
    """List the training rows of a run that may be wrong: the answer of a similar row fits ten times as well.

    Two short trainings take half of the rows each, and score the other half, so that no model scores rows that it was
    trained on. That takes nearly as long as three passes over the rows. The scores stay in the run folder, and the same
    command continues after an interruption. Read the rows before you drop any. `siftune train --drop-rows FILE` trains
    without the rows of a list.
    """

    run: Annotated[str, Flag("run", positional=True)]
    """Run folder."""
    top: Count | None = None
    """Report at most N rows; if not given, 10 on the screen and all in the file. If the losses do not tell which rows
    are wrong, the N with the highest scores."""
    csv: Path | None = None
    """Write them to this CSV file, with complete texts."""
    base: str | None = None
    """Base model of the run, if it has moved: a folder, hub id, smollm2 or a kit."""


_SHOWN = 10
NOTE = "The answer of a similar row fits at least ten times as well. A fifth may be correct: read before you drop any."


def run(options: Options) -> dict[str, Any]:
    """Score rows, show suspects, and write the file."""
    if options.csv is not None and options.csv.expanduser().is_dir():
        raise RecipeError(f"--csv {options.csv} is a folder: give the file to write")
    folder = Path(options.run).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no run folder {options.run}; give one that siftune train has made")
    if not (folder / "recipe.yaml").is_file():
        raise DataError(f"{options.run} has no recipe.yaml, so it is no run folder; give one of siftune train")
    refuse_links(folder)

    from siftune.base.stages import text_console
    from siftune.report.suspects import table, to_csv
    from siftune.report.table import plain_table
    from siftune.suspects.named import ScoredRows
    from siftune.train.folder.run_folder import LOSSES

    errors = text_console(stderr=True)
    if not (folder / LOSSES).is_file():
        from siftune.suspects.scoring import score_run  # imports torch

        score_run(folder, options.base, errors, source_of)
    rows = ScoredRows(folder)
    count = rows.suspects or options.top or 0
    listed = rows.highest(min(count, options.top or count))
    title = f"{rows.suspects:,} of {counted(len(rows.rows), 'row')} of {options.run} may be wrong"
    title += "" if rows.suspects else "; highest scores:"
    shown, note = listed[: options.top or _SHOWN], rows.doubt or NOTE
    if shown:
        text_console().print(plain_table(table(shown, title)), markup=False)
    more = f"{len(listed) - len(shown):,} more with --top or --csv FILE; " if len(listed) > len(shown) else ""
    advice = f"\n{more}`siftune train --drop-rows FILE` trains without the rows of a list" if rows.suspects else ""
    errors.print(f"{note}{advice}", markup=False)
    if options.csv is not None:
        _write(options.csv, to_csv(listed, selected=not rows.suspects))
    return {"run": folder, "rows": len(rows.rows), "suspects": rows.suspects, "listed": listed}


def _write(path: Path, text: str) -> None:
    from siftune.base.files import keep_edited, write_beside

    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    keep_edited(path, hashlib.sha256(text.encode()).hexdigest())
    with write_beside(path) as [beside]:
        beside.write_text(text, encoding="utf-8")
