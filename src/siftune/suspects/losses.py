"""Losses of all training rows and of decoys under the final model: one forward pass, kept in the run folder.

One model scores all rows at one time *(ours)*. Losses of training fall from step to step, so early rows look worse than
late ones, and rows of a task that is learned in few steps look worse than wrong rows. A row's loss is the sum over its
label tokens, −ln p(completion | prompt), in nats. A decoy has a row's prompt with the completion of another row of its
source. `rule` compares rows with decoys. If the losses name rows of a source, its decoys and the rows that these come
from are scored after another prompt, too.

The pass is a forward without a backward, a third of an epoch, and at most 600 rows more per source. `siftune rows` runs
it once, on demand *(ours)*: as a part of training it would add a third to a run of one epoch. Rows of a target are
trusted, and get no score.

    losses.parquet    a line for each row and decoy: row int32, loss float32, tokens int32, decoy bool, and elsewhere
                      float32, the loss after another prompt
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.base.errors import DataError
from siftune.base.files import Progress, refuse_links, write_beside
from siftune.base.text import one_line
from siftune.data.rows import Row
from siftune.data.target import source_or_file
from siftune.data.tokens import Form, tokens_of
from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.records.again import rows_again
from siftune.records.rows import digest_of
from siftune.records.visits import NAME, read_visits
from siftune.suspects.rule import Scores, judge
from siftune.train.folder.run import LOSSES

_ABOUT = b"siftune"  # key in the Parquet metadata
_COLUMNS = {"row": "int32", "loss": "float32", "tokens": "int32", "decoy": "bool", "elsewhere": "float32"}
_LARGER = 2  # rows per forward pass, over those of a training batch: no activations are kept
_DECOYS = 200  # of a source: the share of decoys above a loss is then known to a few percent (ours)
_RARE = 64  # rows of a source; smaller sources are taken together (ours)
DECOY, ROW_ELSEWHERE, DECOY_ELSEWHERE = "decoy", "row elsewhere", "decoy elsewhere"
_AGAIN = "remove it, and `siftune rows` scores the rows again."


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of rows and decoys under one model; R of both.

    Attributes:
        row: (R,) int32, number of the row; of a decoy, the row with its prompt.
        loss: (R,) float32, summed over label tokens in nats.
        tokens: (R,) int32, number of label tokens.
        decoy: (R,) bool.
        elsewhere: (R,) float32, loss of the same completion after another prompt of the source; NaN if not measured.
    """

    row: NDArray[np.int32]
    loss: NDArray[np.float32]
    tokens: NDArray[np.int32]
    decoy: NDArray[np.bool_]
    elsewhere: NDArray[np.float32]

    @property
    def gain(self) -> NDArray[np.float32]:
        """(R,) by how much the prompt lowers the loss, compared with another; NaN if not measured."""
        return self.elsewhere - self.loss


def score_run(
    run: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """Score the training rows of a run, and write `losses.parquet` into its folder.

    Args:
        run: The run folder.
        model: Its final model.
        tokenizer: The model's tokenizer.
        files: Files of the rows, if the recipe is not the user's own: see `records.again`.
        progress: Receives the number of scored rows.

    Raises:
        DataError: As `trained_rows`.
        RecipeError: The recipe cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    rows, about = trained_rows(run, files)
    recipe: Recipe = load_recipe(run / "recipe.yaml")
    form = Form(tokenizer, recipe.max_length, recipe.template, recipe.completion_only)
    tokens = tokens_of(rows, form, progress)
    if tokens.bad:
        raise DataError(f"{tokens.faults(rows)[0]}; the run {run} could use this row, so its tokenizer has changed.")
    numbers = [at for at, row in enumerate(rows) if not row.of_target]
    pairs = list(zip(tokens.data["input_ids"], tokens.data["labels"], strict=True))
    own = [rows[at] for at in numbers]
    kinds = np.unique(kinds_of(own), return_inverse=True)[1]
    made, size = swapped_of(own, recipe.seed), _LARGER * recipe.batch_size
    with short_rows():
        result = row_nll(model, [pairs[at] for at in numbers], size, progress)
        decoys = _scored(model, {key: row for key, row in made.items() if key[1] == DECOY}, form, size)
        told = _told(result.nll, np.array([nll for nll, _ in decoys.values()]), kinds, [at for at, _ in decoys])
        asked = {key: row for key, row in made.items() if key[1] != DECOY and kinds[key[0]] in told}
        elsewhere = _scored(model, asked, form, size)
    unknown = (np.nan, 0)
    lines = [
        (number, nll, count, False, elsewhere.get((at, ROW_ELSEWHERE), unknown)[0])
        for at, (number, nll, count) in enumerate(zip(numbers, result.nll, result.tokens, strict=True))
    ] + [
        (numbers[at], nll, count, True, elsewhere.get((at, DECOY_ELSEWHERE), unknown)[0])
        for (at, _), (nll, count) in decoys.items()
    ]
    columns = zip(*lines, strict=True)
    table = {name: np.asarray(part).astype(kind) for (name, kind), part in zip(_COLUMNS.items(), columns, strict=True)}
    with write_beside(run / LOSSES) as [beside]:
        parquet.write_table(pyarrow.table(table).replace_schema_metadata({_ABOUT: about}), beside, compression="zstd")


def _scored(
    model: nn.Module, rows: Mapping[tuple[int, str], Row], form: Form, size: int
) -> dict[tuple[int, str], tuple[float, int]]:
    """Loss and number of label tokens of rows that were made; those that cannot be tokenised are left out."""
    if not rows:
        return {}
    tokens = tokens_of(list(rows.values()), form)
    keys = [key for place, key in enumerate(rows) if place not in tokens.bad]
    result = row_nll(model, list(zip(tokens.data["input_ids"], tokens.data["labels"], strict=True)), size)
    return dict(zip(keys, zip(result.nll.tolist(), result.tokens.tolist(), strict=True), strict=True))


def _told(
    losses: NDArray[np.float64], decoys: NDArray[np.float64], kinds: NDArray[np.int64], of_decoys: Sequence[int]
) -> set[int]:
    """Sources with suspects by the losses alone, of which alone the gains count."""
    verdict = judge(Scores(losses, kinds), Scores(decoys, kinds[[*of_decoys]]))
    return set(kinds[verdict.order[: verdict.count]].tolist())


def kinds_of(rows: Sequence[Row]) -> list[str]:
    """Source of each row: its column `source`, or its file; "" for rare sources, or if all rows are of one."""
    names = source_or_file(rows)
    counts = Counter(names)
    return [""] * len(rows) if len(counts) < 2 else [name if counts[name] >= _RARE else "" for name in names]


def swapped_of(rows: Sequence[Row], seed: int) -> dict[tuple[int, str], Row]:
    """Give some rows of each source the completion of another row of it, and both completions another prompt.

    Args:
        rows: The rows.
        seed: Of the choice.

    Returns:
        Number of a row and a kind -> the changed row. Kinds are "decoy", with the row's prompt and another completion,
        and "row elsewhere" and "decoy elsewhere", with the row's or decoy's completion after another row's prompt.
        Plain texts have no prompt, and rows of a source with one completion have no other: they get none.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> few = rows_from([{"prompt": f"{n}?", "completion": str(n)} for n in (1, 2, 3)])
        >>> [row.prompt[0].content + row.completion for row in swapped_of(few[:2], seed=0).values()]
        ['1?2', '2?1', '2?2', '2?1', '1?2', '1?1']
    """
    randomness, made = random.Random(f"decoys {seed}"), dict[tuple[int, str], Row]()
    places: dict[str, list[int]] = {}
    for at, kind in enumerate(kinds_of(rows)):
        places.setdefault(kind, []).append(at)
    for own in places.values():
        asked = [at for at in own if rows[at].prompt]
        for at in sorted(randomness.sample(asked, min(len(asked), _DECOYS))):
            row, draws = rows[at], [rows[place] for place in _draws(randomness, own)]
            completion = next((other.completion for other in draws if other.completion != row.completion), None)
            if completion is None:
                continue
            decoy = made[at, DECOY] = replace(row, completion=completion)
            draws = [rows[place] for place in _draws(randomness, asked)]
            prompt = next((other.prompt for other in draws if other.prompt != row.prompt), None)
            if prompt is not None:
                made[at, ROW_ELSEWHERE] = replace(row, prompt=prompt)
                made[at, DECOY_ELSEWHERE] = replace(decoy, prompt=prompt)
    return made


def _draws(randomness: random.Random, places: Sequence[int]) -> Sequence[int]:
    """A few random places, and then all."""
    return [*randomness.choices(places, k=8), *places]


def trained_rows(run: Path, files: Sequence[str] = ()) -> tuple[list[Row], str]:
    """Read the training rows of a run again, and the digest of their texts.

    Args:
        run: The run folder.
        files: As for `score_run`.

    Raises:
        InputError: The folder holds a link, which could lead to any file, or its recipe names files that the user has
            not named.
        DataError: They cannot be read, or have changed since the run; or the run did not record them.
        RecipeError: The recipe cannot be read.
    """
    refuse_links(run)
    rows = rows_again(run, files)
    about = digest_of(rows)
    if read_visits(run / NAME).about != about:
        raise DataError(
            f"the training rows have changed since {run} was trained, so its model says nothing on them: restore them, "
            "or train again."
        )
    return rows, about


def read_losses(run: Path, about: str) -> Losses:
    """Read the losses of a run's rows.

    Args:
        run: The run folder.
        about: Digest of the texts of its training rows.

    Raises:
        DataError: The file is missing, damaged, or of other rows.
    """
    import pyarrow
    from pyarrow import parquet

    path = run / LOSSES
    try:
        table = parquet.read_table(path)
        losses = Losses(**{name: table[name].to_numpy().astype(kind) for name, kind in _COLUMNS.items()})
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist, so the rows have no scores: `siftune rows {run}` scores them."
        ) from None
    except (pyarrow.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({one_line(str(error))}); {_AGAIN}") from None
    if (table.schema.metadata or {}).get(_ABOUT) != about.encode():
        raise DataError(f"{path} is of other rows than the run's; {_AGAIN}")
    return losses
