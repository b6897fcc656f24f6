"""Values that no row should have, and files that other programs leave: rows, or one sentence with file and row.

Single defects and their sentences are tested in test_read.py.
"""

import io
import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.tokenizer import byte_tokenizer

from siftune.base.errors import DataError
from siftune.data.read import load_rows
from siftune.data.tokens import tokenize_rows

ROWS = [
    {"prompt": "1 + 1 =", "completion": "2", "weight": 1.5},
    {"prompt": [{"role": "user", "content": "Größe?"}], "completion": [{"role": "assistant", "content": "groß"}]},
    {"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]},
    {"instruction": "add", "input": "1, 1", "output": "2"},
    {"text": 'a line\nand another, "quoted"'},
]
VALUES = (None, True, -1, 10**30, 1.5, float("nan"), "", " \n", "\ud800", "../x\0", [], [None], {}, [[]], {"a": 1})
TURNS = [[{"role": "user", "content": value}, {"role": "assistant", "content": "a"}] for value in VALUES]


def sentences(path, most):
    """Read rows, and use them; the sentences on bad ones are short, and name file and row."""
    bad: list[DataError] = []
    rows = load_rows(str(path), bad=bad)
    for template in ("none", "chat"):
        tokenize_rows(rows, byte_tokenizer(), 64, template)
    for error in map(str, bad):
        assert error.startswith(path.name) or f"/{path.name}:" in error
        assert error.isprintable()
        assert len(error) < 700
    assert len(rows) + len(bad) == most
    return rows, [*map(str, bad)]


def test_every_value_in_every_field(tmp_path):
    changed = [row | {name: value} for row in ROWS for name in row for value in VALUES]
    changed += [{"messages": turns} for turns in TURNS] + [{"prompt": turns[:1], "completion": "a"} for turns in TURNS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    rows, errors = sentences(tmp_path / "rows.jsonl", len(changed))
    assert len(errors) > 100
    assert len(rows) > 20


@pytest.mark.parametrize("end", [0, 3, 0.5, -1])
def test_parquet_that_is_cut(tmp_path, end):
    sink = io.BytesIO()
    parquet.write_table(pa.table({"prompt": ["a"] * 4, "completion": ["b"] * 4}), sink)
    data = sink.getvalue()
    (tmp_path / "rows.parquet").write_bytes(data[: len(data) // 2 if end == 0.5 else end])
    with pytest.raises(DataError, match=r"rows\.parquet"):
        load_rows(str(tmp_path / "rows.parquet"))
