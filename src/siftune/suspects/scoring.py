"""Score the training rows of a run under models that were not trained on them.

A model repeats the rows that it was trained on, wrong ones too, so that their losses say little after a few passes. The
rows are therefore split into halves (ours). Two short trainings with the run's own settings take a half each, and score
the other half and its decoys. Copies are in the same half. Rows of a target are trusted: they are in both trainings,
and get no score.

A training takes one pass over its half, at least 30 and at most 300 steps (ours). An interrupted call continues:

    RUN/halves/0/, 1/         run folders of the trainings
    RUN/halves/0.parquet, …   losses of the half that a training scores, as in `losses`
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from siftune.base.errors import DataError, TrainingError
from siftune.base.files import Progress
from siftune.base.stages import stages, text_console
from siftune.base.text import counted
from siftune.data.decisions import absolute_place
from siftune.data.rows import Row, row_texts
from siftune.data.tokens import Form
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import read_rows, recipe_of_rows
from siftune.suspects.answers import answers_of
from siftune.suspects.decoys import Decoys, decoys_of
from siftune.suspects.losses import Losses, read_losses, trained_rows, write_losses
from siftune.suspects.margins import margins
from siftune.suspects.rule import COMPARED
from siftune.train.folder.run_folder import HALVES, LOSSES, RunFolder
from siftune.train.guards.memory import free
from siftune.train.run import Run
from siftune.train.run import train as tune
from siftune.train.source import ModelSource, Source

FEWEST, MOST = 30, 300  # steps of a training (ours)
_LARGER = 2  # rows per forward pass, over those of a training batch: no activations are kept


def score_run(
    run: Path,
    base: str | None = None,
    console: Console | None = None,
    source_of: Callable[[str], Source] = ModelSource,
) -> None:
    """Score the training rows of a run, and write `losses.parquet` into its folder.

    Args:
        run: The run folder.
        base: The model to train, in the place of that of the recipe.
        console: For progress; stderr by default.
        source_of: Maps the name of the model to its source, as for `siftune.train.run.train`.

    Raises:
        InputError: As `trained_rows`, or the model cannot be used, or too few rows can be compared.
        TrainingError: A training failed.
    """
    console = console or text_console(stderr=True)
    rows, about = trained_rows(run)
    recipe = recipe_of_rows(run)
    recipe = replace(recipe, model=base or recipe.model)
    numbers = np.array([at for at, row in enumerate(rows) if not row.of_target])
    half_R = half_of([rows[at] for at in numbers])
    halves = [[rows[at] for at in numbers[half_R == half]] for half in (0, 1)]
    decoys = [decoys_of(own, recipe.seed) for own in halves]
    compared = sum(int((each.numbers[:, 0] >= 0).sum()) for each in decoys)
    if compared < COMPARED:
        raise DataError(
            f"only {counted(compared, 'row')} of {run} can be compared with a row that has another answer, but "
            f"{COMPARED} are needed; rows of plain text have no answers"
        )
    folder, parts = run / HALVES, []
    folder.mkdir(exist_ok=True)
    try:
        for half in (0, 1):
            path = folder / f"{half}.parquet"
            if not path.is_file():
                own = numbers[half_R == half]
                tuned = tuned_on(halves[1 - half], recipe, folder / str(half), console, source_of)
                with stages(console) as progress:
                    losses = losses_of(tuned, halves[half], decoys[half], recipe, progress)
                other = np.where(losses.other < 0, -1, own[losses.other]).astype(np.int32)
                write_losses(path, replace(losses, row=own.astype(np.int32), other=other), about)
                del tuned
                free()
            parts.append(read_losses(path, about, len(rows)))
    except KeyboardInterrupt as stop:
        stop.__notes__ = ["the same command continues"]  # not that of the training
        raise
    except DataError:
        if not parts:  # there is nothing to continue with
            shutil.rmtree(folder, ignore_errors=True)
        raise
    every = Losses(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Losses)))
    order = np.argsort(every.row)
    write_losses(run / LOSSES, Losses(*(getattr(every, each.name)[order] for each in fields(Losses))), about)
    shutil.rmtree(folder)


def half_of(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Number of each row's half, 0 or 1, by the hash of its text, since answers may alternate among sorted texts; (R,).

    Example:
        >>> from siftune.data.rows import rows_from
        >>> half_of(rows_from([{"text": text} for text in ("one", "two", "one", "three")])).tolist()
        [0, 0, 0, 1]
    """
    texts = [*row_texts(rows)]
    mixed = sorted({*texts}, key=lambda text: hashlib.sha256(text).digest())
    numbers = {text: number for number, text in enumerate(mixed)}
    return np.array([numbers[text] % 2 for text in texts])


def tuned_on(
    rows: Sequence[Row], recipe: Recipe, folder: Path, console: Console, source_of: Callable[[str], Source]
) -> Run:
    """Train on some of the rows of a run, and on its target.

    Args:
        rows: The rows, without those of the target.
        recipe: The run's recipe.
        folder: Run folder of the training; a training that was interrupted there continues.
        console: For progress.
        source_of: As for `score_run`.

    Raises:
        TrainingError: The training failed.
    """
    continues = folder.exists() and RunFolder(folder).has_checkpoint() and not RunFolder(folder).has_finished()
    if folder.exists() and not continues:
        shutil.rmtree(folder)
    places = {absolute_place(row.origin) for row in rows}
    recipe = replace(recipe, eval=None, eval_share=0.0, keep=None)
    every = read_rows(replace(recipe, target=None, drop_rows=None, method="dense", bad_rows="drop")).parts["train"]
    others = [place for row in every if (place := absolute_place(row.origin)) not in places]
    drop_rows = folder.with_suffix(".txt")
    drop_rows.write_text("".join(f"{place}\n" for place in others), encoding="utf-8")
    of_target = recipe.target_share if recipe.target else 0.0
    steps = round(len(rows) / (1 - of_target) / (recipe.batch_size * recipe.accumulate))
    recipe = replace(
        recipe,
        drop_rows=str(drop_rows),
        from_adapter=None,
        steps=min(max(steps, FEWEST), MOST),
        warmup=Recipe.warmup,
        out=str(folder),
        resume=continues,
        save_every=None,
        eval_every=None,
        patience=None,
        report_to=("none",),
        sharding="none",
    )
    console.print(f"training on {counted(len(rows), 'row')}, to score the others", markup=False)
    try:
        return tune(recipe, console, source_of)
    except TrainingError as error:  # without the advice to resume that training as a run
        cause = error.__cause__ if isinstance(error.__cause__, TrainingError) else error
        raise TrainingError(f"training on half of the rows: {cause}") from error


def losses_of(
    tuned: Run, rows: Sequence[Row], decoys: Decoys, recipe: Recipe, progress: Progress | None = None
) -> Losses:
    """Score rows and their decoys by one model.

    Args:
        tuned: The model and its tokenizer.
        rows: Rows that it was not trained on.
        decoys: Their decoys.
        recipe: Its recipe.
        progress: Receives the number of scored rows.

    Returns:
        The losses; numbers of rows are those of `rows`.
    """
    form = Form(tuned.tokenizer, recipe.max_length, recipe.template)
    rows = [row.last_answer() for row in rows]  # an earlier answer of a conversation belongs to the prompt
    answers = answers_of(tuned.model, rows, rows, decoys.numbers, form, _LARGER * recipe.batch_size, progress)
    texts = [row.completion.strip() for row in rows]
    compared = margins(texts, answers.tokens, answers.own, decoys.numbers, answers.others)
    return Losses(
        row=np.arange(len(rows), dtype=np.int32),
        tokens=answers.tokens.astype(np.int32),
        other=compared.other.astype(np.int32),
        covered=decoys.covered,
        loss=answers.own.astype(np.float32),
        other_loss=compared.other_loss.astype(np.float32),
        usual=compared.usual.astype(np.float32),
        other_usual=compared.other_usual.astype(np.float32),
    )
