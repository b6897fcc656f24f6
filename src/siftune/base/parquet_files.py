"""Parquet files of run folders, which a disk may have changed.

Pages are written with checksums, and read only if these are right (ours).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftune.base.errors import InputError
from siftune.base.files import write_beside
from siftune.base.text import one_line

if TYPE_CHECKING:
    import pyarrow


def write_table(path: Path, table: "pyarrow.Table", **options: Any) -> None:
    """Write a table in one move, with checksums; `options` are further ones of pyarrow's `write_table`."""
    from pyarrow import parquet

    with write_beside(path) as [beside]:
        parquet.write_table(table, beside, compression="zstd", write_page_checksum=True, **options)


def read_table(
    path: Path,
    types: Mapping[str, "pyarrow.DataType"],
    advice: str,
    nullable: Collection[str] = (),
) -> "pyarrow.Table":
    """Read a table that `write_table` wrote.

    Args:
        path: The file.
        types: The columns.
        advice: What to do if it cannot be read, for the message.
        nullable: Columns that may have nulls.

    Raises:
        InputError: It is missing, damaged, or has other columns.

    Example:
        >>> import pyarrow, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.parquet"
        >>> write_table(path, pyarrow.table({"row": [1, 2]}))
        >>> read_table(path, {"row": pyarrow.int64()}, "train again")["row"].to_pylist()
        [1, 2]
        >>> try:
        ...     read_table(path, {"row": pyarrow.string()}, "train again")
        ... except InputError as error:
        ...     print(str(error).replace(str(path), "rows.parquet"))
        rows.parquet is damaged (its columns are row: int64, not row: string); train again
    """
    import pyarrow
    from pyarrow import parquet

    batches = list[pyarrow.RecordBatch]()
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
            for batch in file.iter_batches():
                batch.validate(full=True)  # also that texts are UTF-8
                batches.append(batch)
        table = pyarrow.Table.from_batches(batches, schema)
        if len(table) != count:
            raise pyarrow.ArrowException(f"it has {len(table)} of {count} rows")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({one_line(str(error))}); {advice}") from error
    own = dict(zip(schema.names, schema.types, strict=True))
    if own != dict(types):
        raise InputError(f"{path} is damaged (its columns are {_listed(own)}, not {_listed(types)}); {advice}")
    for name in own.keys() - {*nullable}:
        if table[name].null_count:
            raise InputError(f"{path} is damaged (its column {name} has nulls); {advice}")
    return table


def _listed(types: Mapping[str, "pyarrow.DataType"]) -> str:
    return one_line(", ".join(f"{name}: {kind}" for name, kind in types.items()))
