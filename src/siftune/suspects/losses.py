"""File with the losses of a run's rows and their decoys; `scoring` computes them.

A loss is −ln p(completion | prompt), summed over label tokens, in nats, under a model that was not trained on the row.

    losses.parquet    a line for each row: row, tokens and other int32; covered bool; loss, other_loss, usual and
                      other_usual float32; see `Losses`
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siftune.base.errors import DataError
from siftune.base.files import refuse_links
from siftune.base.parquet_files import read_table, write_table
from siftune.data.rows import Row
from siftune.recipe.training_rows import digest_of, recipe_of_rows, recorded_digest, refuse_changed, used_rows

_ABOUT = b"siftune"  # key in the Parquet metadata
_NUMBERS = ("row", "tokens", "other")  # columns of whole numbers
_AGAIN = "remove it, and `siftune rows` scores the rows again"
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of R rows and of the decoys that fit best, in nats; NaN where not measured.

    A decoy of a row is its prompt with the completion of another row of a similar prompt.

    Attributes:
        row: (R,) int32, number of the row among the training rows.
        tokens: (R,) int32, number of its label tokens.
        other: (R,) int32, number of the row whose completion the decoy has; -1 without a decoy.
        covered: (R,) bool, whether rows with similar prompts have the row's completion: see `decoys.Decoys`.
        loss: (R,) float32, loss of the row's completion after its prompt.
        other_loss: (R,) float32, loss of the other completion after the row's prompt.
        usual: (R,) float32, usual loss of the row's completion after prompts of other rows: see `margins`.
        other_usual: (R,) float32, that of the other completion.
    """

    row: Ints
    tokens: Ints
    other: Ints
    covered: NDArray[np.bool_]
    loss: Floats
    other_loss: Floats
    usual: Floats
    other_usual: Floats


def trained_rows(run: Path) -> tuple[list[Row], str]:
    """Read the training rows of a run again, and the digest of their texts.

    Args:
        run: The run folder.

    Raises:
        InputError: The folder holds a link, by which a write could go elsewhere.
        DataError: They cannot be read, or have changed since the run; or the run was private.
        RecipeError: The recipe cannot be read.
    """
    refuse_links(run)
    rows = used_rows(run, recipe_of_rows(run))["train"]
    if recorded_digest(run) is None:
        raise DataError(f"{run} has no hash of its training rows, as a private run: train without dp_epsilon")
    refuse_changed(run, rows)
    return rows, digest_of(rows)


def write_losses(path: Path, losses: Losses, about: str) -> None:
    """Write the losses of a run's rows.

    Args:
        path: The file.
        losses: The losses.
        about: Digest of the texts of its training rows.
    """
    import pyarrow

    write_table(path, pyarrow.table(vars(losses)).replace_schema_metadata({_ABOUT: about}))


def read_losses(path: Path, about: str, count: int) -> Losses:
    """Read the losses of a run's rows.

    Args:
        path: The file.
        about: Digest of the texts of its training rows.
        count: Number of its training rows.

    Raises:
        DataError: The file is missing, or of other rows.
        InputError: It is damaged.
    """
    import pyarrow

    if not path.exists():
        raise DataError(f"{path} does not exist, so the rows have no scores: `siftune rows {path.parent}` scores them")
    types = {each.name: pyarrow.int32() if each.name in _NUMBERS else pyarrow.float32() for each in fields(Losses)}
    types["covered"] = pyarrow.bool_()
    table = read_table(path, types, _AGAIN)
    losses = Losses(**{name: table[name].to_numpy() for name in types})
    if (table.schema.metadata or {}).get(_ABOUT) != about.encode():
        raise DataError(f"{path} is of other rows than the run's; {_AGAIN}")
    every = np.concatenate([losses.row, losses.other])
    if ((losses.row < 0) | (losses.other < -1)).any() or (every >= count).any():
        raise DataError(f"{path} has rows that the run does not have; {_AGAIN}")
    return losses
