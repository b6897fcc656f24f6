"""File of finished jobs: one line of JSON each; several processes may add lines at the same time."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Job = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Read finished jobs; an incomplete line is skipped with a message."""
    if not path.exists():
        return []
    return list(_lines(path))


def _lines(path: Path) -> Iterator[Line]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            if text.strip():
                yield json.loads(text)
        except ValueError:
            print(f"{path}:{number}: incomplete line of JSON, skipped", file=sys.stderr)


def key(job: Job) -> str:
    """Identity of a job."""
    return json.dumps(job, sort_keys=True)


def append(path: Path, line: Line) -> None:
    """Add a complete line by one write under a lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
        end = file.seek(0, os.SEEK_END)
        whole = not end or _last_byte(path, end) == b"\n"
        os.write(file.fileno(), (b"" if whole else b"\n") + json.dumps(line).encode() + b"\n")


def _last_byte(path: Path, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(end - 1)
        return file.read(1)
