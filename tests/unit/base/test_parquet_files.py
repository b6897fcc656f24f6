"""Damaged Parquet files end in one error that names the file; what is read is what was written."""

import random

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from siftune.base.errors import DataError, InputError
from siftune.base.parquet_files import read_table, write_table
from siftune.suspects.losses import Losses, read_losses, write_losses

TABLE = pyarrow.table(
    {
        "row": np.arange(300, dtype=np.int32),
        "loss": np.random.default_rng(0).random(300).astype(np.float32),
        "place": pyarrow.array([f"rows.jsonl:{row % 7}" for row in range(300)]).dictionary_encode(),
    }
).replace_schema_metadata({"siftune": "a" * 64})
TYPES = dict(zip(TABLE.schema.names, TABLE.schema.types, strict=True))


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    path, generator = tmp_path / "rows.parquet", random.Random(0)
    write_table(path, TABLE)
    data, refused = path.read_bytes(), 0
    for _ in range(300):
        place = generator.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :])
        try:
            assert read_table(path, TYPES, "").equals(TABLE)  # readers compare the metadata themselves
        except InputError:
            refused += 1
    assert refused > 200


def test_a_file_without_columns_with_others_or_with_nulls_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    write_table(path, TABLE)
    assert read_table(path, TYPES, "").equals(TABLE)
    for types in ({}, {**TYPES, "more": pyarrow.int32()}, {**TYPES, "row": pyarrow.int64()}):
        with pytest.raises(InputError, match=r"rows\.parquet .*row: int32.*train again"):
            read_table(path, types, "train again")
    write_table(path, pyarrow.table({"row": pyarrow.array([1, None], pyarrow.int32())}))
    with pytest.raises(InputError, match="its column row has nulls"):
        read_table(path, {"row": pyarrow.int32()}, "")
    read_table(path, {"row": pyarrow.int32()}, "", nullable=("row",))


def test_texts_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    parquet.write_table(pyarrow.table({"place": texts}), path)
    with pytest.raises(InputError, match=r"rows\.parquet is damaged"):
        read_table(path, {"place": pyarrow.string()}, "")


@pytest.mark.parametrize("name", ["row", "other"])
@pytest.mark.parametrize(("value", "is_sound"), [(-2, False), (-1, "other"), (0, True), (4, True), (5, False)])
def test_losses_of_rows_that_a_run_does_not_have_are_refused(tmp_path, name, value, is_sound):
    path = tmp_path / "losses.parquet"
    kinds = {"row": np.int32, "tokens": np.int32, "other": np.int32, "covered": bool}
    columns = {each: np.zeros(1, kinds.get(each, np.float32)) for each in Losses.__annotations__}
    write_losses(path, Losses(**{**columns, name: np.array([value], np.int32)}), "about")
    if is_sound in (True, name):
        assert read_losses(path, "about", 5).row.dtype == np.int32
    else:
        with pytest.raises(DataError, match=r"losses\.parquet has rows"):
            read_losses(path, "about", 5)
