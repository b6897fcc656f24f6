"""Damaged files of rows: the result is rows, or one sentence that names the file.

A file of each kind is cut, flipped, filled with what editors and other programs leave, and its fields hold everything
that JSON or Parquet can hold. `pytest` runs a sample; `pytest -m fuzz` runs all.
"""

import csv
import datetime
import decimal
import io
import random

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.damage import dump, mutations
from support.tokenizer import byte_tokenizer

from siftune.base.errors import DataError
from siftune.data.read import load_rows
from siftune.data.tokens import tokenize_rows

SAMPLE = 80
ROWS = [
    {"prompt": "1 + 1 =", "completion": "2", "weight": 1.5},
    {"prompt": [{"role": "user", "content": "Größe?"}], "completion": [{"role": "assistant", "content": "groß"}]},
    {"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]},
    {"instruction": "add", "input": "1, 1", "output": "2"},
    {"text": "a line\nand another, \"quoted\""},
]  # fmt: skip
INSERTED = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\x0b", b"\x1a", b"\x85", b'"', b"\\", b"{",
    b"]", b",", b"\\ud800", b"\\u0000", b"'", b"\n", b"\n\n", b" ", b"\t", b"//", b"#", b"NaN", b"-Infinity", 
    b"1e999", "\u2028".encode(), "\u202e".encode(), "\ufdd0".encode(), b"9" * 5000, b"[" * 5000,
)  # fmt: skip


def jsonl(records):
    return b"".join(dump(record).replace(b"\n", b" ") + b"\n" for record in records)


def table(columns):
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


def fields(rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def sound():
    """Name and bytes of files that can be read."""
    plain = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(4)]
    yield "rows.jsonl", jsonl(plain)
    yield "rows.json", dump(plain)
    yield "data.json", dump({"data": plain})
    yield "rows.csv", fields([("prompt", "completion"), *((row["prompt"], row["completion"]) for row in plain)])
    yield "rows.parquet", table({name: [row[name] for row in plain] for name in ("prompt", "completion")})
    for number, row in enumerate(ROWS):
        yield f"kind{number}.jsonl", jsonl([row, row])


def broken_bytes():
    """Files that were cut, flipped and filled."""
    for name, data in sound():
        draw = random.Random(name)
        yield name, b"", "empty"
        yield name, b"\n \n", "blank"
        yield from ((name, data[: len(data) * part // 12], f"{part}/12 of it") for part in range(1, 12))
        for number in range(20):
            spoilt = bytearray(data)
            spoilt[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            yield name, bytes(spoilt), f"bit {number}"
        for what in INSERTED:
            at = draw.randrange(len(data) + 1)
            yield name, data[:at] + what + data[at:], f"{what[:9]!r} at {at}"
            yield name, what + data, f"{what[:9]!r} first"
        other = "rows.csv" if name.endswith(".parquet") else "rows.parquet"
        yield other, data, f"{name} under another name"
        for encoding in ("utf-16", "utf-32", "latin-1"):
            yield name, data.decode("latin-1").encode(encoding), encoding


def broken_values():
    """Rows with every value replaced, left out, or renamed."""
    for number, row in enumerate(ROWS):
        for what, changed in mutations(row):
            yield f"kind{number}.jsonl", jsonl([row, changed]), what
            if not isinstance(changed, dict) or changed.keys() != row.keys():
                yield f"kind{number}.json", dump([changed, row]), f"{what}, first"


def odd_columns():
    """Parquet of every type, and CSV with odd headers."""
    day = datetime.datetime(2026, 1, 1)
    values = {
        "int": [1, 2], "float": [1.5, float("nan")], "none": [None, None], "bool": [True, False],
        "binary": [b"\xff", b""], "when": [day, day], "date": [day.date()] * 2, "span": [datetime.timedelta(1)] * 2,
        "decimal": [decimal.Decimal("1.1")] * 2, "list": [["a"], []], "strings": ["a", None],
        "struct": [{"role": "user", "content": None}] * 2, "large": pa.array(["a", "b"], pa.large_string()),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "dictionary": pa.array(["a", "b"]).dictionary_encode(), "half": pa.array([1.0, 2.0], pa.float16()),
    }  # fmt: skip
    for kind, column in values.items():
        for name in ("prompt", "completion", "messages", "text", "weight"):
            columns = (
                {"prompt": ["a", "b"], "completion": ["c", "d"]} if name in ("prompt", "completion", "weight") else {}
            )
            yield "rows.parquet", table({**columns, name: column}), f"{name} is {kind}"
    yield "rows.parquet", table({}), "no columns"
    yield (
        "rows.parquet",
        table({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}),
        "no rows",
    )
    for names in ("", "prompt", "prompt,prompt", "prompt,", "Prompt,Completion", " prompt,completion", "\0,completion",
                  "prompt,completion,completion", "prompt,completion,weight"):  # fmt: skip
        header = names.split(",")
        for row in (["a", "b"], ["a"], ["a", "b", "c"], ["a", "b", "1"], ["", ""], []):
            yield "rows.csv", fields([header, row]), f"{header} over {row}"


CASES = [*broken_bytes(), *broken_values(), *odd_columns()]


def fault(folder, name, data):
    """What went wrong with a file; None where its rows were read, or refused in one sentence."""
    path = folder / name
    path.write_bytes(data)
    tokenizer = byte_tokenizer()
    bad = []
    try:
        rows = load_rows(str(path), bad=bad)
        for template in ("none", "chat") if rows else ():
            tokenize_rows(rows, tokenizer, 64, template)
    except DataError as error:
        bad.append(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for error in bad:
        words = str(error)
        if not words.isprintable() or len(words) > 700 or name not in words:
            return f"said {words!r}"
    return None


def faults(folder, cases):
    return [f"{name}, {what}: {found}" for name, data, what in cases if (found := fault(folder, name, data))]


def test_a_sample_of_damaged_files_is_read_or_refused(tmp_path):
    assert faults(tmp_path, random.Random(0).sample(CASES, SAMPLE)) == []


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(8))
def test_damaged_files_are_read_or_refused(tmp_path, part):
    assert faults(tmp_path, CASES[part::8]) == []


def test_sound_files_are_read(tmp_path):
    for name, data in sound():
        assert fault(tmp_path, name, data) is None
        assert len(load_rows(str(tmp_path / name))) in (2, 4)
