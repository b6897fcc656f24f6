"""Damaged JSON files end in one error that names the file, and damaged lines are left out."""

import json
import math
import random
from typing import Any

import pytest

from siftune.base.errors import InputError
from siftune.base.json_files import read_json, read_json_lines

HOSTILE = {
    "nothing": b"",
    "cut off": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a mark of the byte order": b'\xef\xbb\xbf{"a": 1}',
    "half of a surrogate pair": b'{"a": "\\ud800"}',
    "endless nesting": b'{"a": ' + b"[" * 100_000,
    "deep nesting": b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}",
    "a number of 5,000 digits": b'{"a": 1' + b"0" * 5000 + b"}",
    "another form": b"[1]",
    "a value of another type": b'{"a": "1"}',
    "a fraction": b'{"a": 1.5}',
    "a truth value": b'{"a": true}',
    "more behind it": b'{"a": 1} {}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_file_of_another_form_is_named(tmp_path, content):
    path = tmp_path / "work.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path, dict[str, int], "delete it")
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read (")
    assert message.endswith("); delete it")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_line_of_another_form_is_left_out_alone(tmp_path, content):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + content + b'\n{"a": 2}\n')
    lines, damaged = read_json_lines(path, dict[str, int])
    assert lines == [{"a": 1}, {"a": 2}]
    assert damaged == 1 + content.count(b"\n")  # UTF-16 may have a line break in it


def test_a_file_may_not_be_missing_or_a_folder(tmp_path):
    for name, why in (("none", "No such file"), ("", "directory")):
        with pytest.raises(InputError, match=why):
            read_json(tmp_path / name, str)
    with pytest.raises(InputError):
        read_json_lines(tmp_path, str)
    assert read_json_lines(tmp_path / "none", str) == ([], 0)


def test_a_line_that_is_empty_or_cut_off_is_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'"a"\n\n"b"\n"c"')
    assert read_json_lines(path, str) == (["a", "b"], 2)


def test_numbers_are_read_as_python_reads_them(tmp_path):
    generator, path = random.Random(0), tmp_path / "numbers.json"
    numbers = [generator.uniform(-1, 1) * 10 ** generator.randint(-300, 300) for _ in range(2000)]
    numbers += [math.nan, math.inf, -math.inf, -0.0, 5e-324, 2**70]
    path.write_text(json.dumps({"numbers": numbers}))
    assert json.dumps(read_json(path, dict[str, Any])) == path.read_text()
