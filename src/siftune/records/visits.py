"""Visits of training rows, and their Parquet file: a line for each time that a row was trained on.

    row     int32    number among the training rows, from 0
    place   string   place of the row, such as rows.jsonl:17, if known
    step    int32    optimizer steps done before
    loss    float32  mean cross entropy of its label tokens in nats, in the forward pass of training; NaN without
                     label tokens
    tokens  int32    its label tokens

Lines are sorted by step, then by row, independent of ranks and batches. Read it with pandas, polars, DuckDB or
`read_visits`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from siftune.base.errors import DataError
from siftune.base.parquet_files import read_table, write_table

if TYPE_CHECKING:
    import pyarrow

NAME = "rows.parquet"
ABOUT = b"siftune"  # key in the Parquet metadata
_AGAIN = "train again to have rows recorded"
_COLUMNS = {"row": "int32", "step": "int32", "loss": "float32", "tokens": "int32"}
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Visits:
    """Visits of rows, V of them; columns as in the header of this file.

    Attributes:
        row: (V,) int32.
        step: (V,) int32.
        loss: (V,) float32.
        tokens: (V,) int32.
    """

    row: Ints
    step: Ints
    loss: Floats
    tokens: Ints

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, table: NDArray[np.float64]) -> "Visits":
        """Visits of a table, (4, V), whose lines are the columns, in the order of the file."""
        order = np.lexsort((table[0], table[1]))
        columns = zip(_COLUMNS.items(), table[:, order], strict=True)
        return cls(**{name: values.astype(kind) for (name, kind), values in columns})

    def table(self) -> NDArray[np.float64]:
        """The columns as lines, (4, V)."""
        return np.stack([getattr(self, field.name).astype(np.float64) for field in fields(self)])


NOTHING = np.zeros((len(_COLUMNS), 0))


def write_visits(path: Path, visits: Visits, places: Sequence[str] = (), about: str = "") -> None:
    """Write visits in one move.

    Args:
        path: The file; its folder is created.
        visits: The visits.
        places: Place of each row, by its number; empty if unknown.
        about: Text stored with the rows, so that a reader can check that they have not changed.
    """
    import pyarrow

    columns: dict[str, Any] = {"row": visits.row}
    if places:
        columns["place"] = _in_words(visits.row, places)
    columns |= {"step": visits.step, "loss": visits.loss, "tokens": visits.tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, pyarrow.table(columns).replace_schema_metadata({ABOUT: about}))


def _in_words(rows: Ints, places: Sequence[str]) -> "pyarrow.DictionaryArray":
    """Place of each visit, as a dictionary array; rows may share a place."""
    import pyarrow

    known: dict[str, int] = {}
    numbers = np.array([known.setdefault(place, len(known)) for place in places], dtype=np.int32)
    return pyarrow.DictionaryArray.from_arrays(numbers[rows], pyarrow.array(list(known)))


@dataclass(frozen=True, eq=False)
class Record:
    """Content of a file of visits.

    Attributes:
        visits: The visits.
        places: (V,) place of each visit's row; empty if unknown.
        about: Text stored with the rows.
    """

    visits: Visits
    places: Sequence[str]
    about: str


def read_visits(path: Path) -> Record:
    """Read a file of visits.

    Raises:
        DataError: The file is missing.
        InputError: It is damaged, or not a file of visits.
    """
    import pyarrow

    if not path.exists():
        raise DataError(
            f"{path} does not exist, so no rows were recorded: train with siftune train, without dp_epsilon, or with "
            "the callback RowRecord()."
        )
    numbers = {name: getattr(pyarrow, kind)() for name, kind in _COLUMNS.items()}
    places = {"place": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    table = read_table(path, numbers, _AGAIN, places)
    columns = {name: table[name].to_numpy() for name in _COLUMNS}
    named = table["place"].to_pylist() if "place" in table.column_names else []
    metadata: Mapping[bytes, bytes] = table.schema.metadata or {}
    return Record(Visits(**columns), named, metadata.get(ABOUT, b"").decode(errors="replace"))
