"""File of finished jobs: one line of JSON each; several processes may add lines at the same time."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]

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


def work_off(argv: list[str], run: Callable[[Job, Path, Path], tuple[Line, str]]) -> int:
    """Work off the job of standard input, as a process of a queue.

    Args:
        argv: The file for the result, and the folder of the data.
        run: Takes the job, the folder of the data and a temporary folder; returns the result and a sentence on it.

    Returns:
        The exit code.
    """
    from siftune.base.environment import hardware, versions
    from siftune.base.errors import SiftuneError

    job, code = json.loads(sys.stdin.read()), commit()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result, sentence = run(job, Path(argv[1]), Path(folder))
    except SiftuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    append(Path(argv[0]), {"job": job, **result, "commit": code, "hardware": hardware(), "versions": versions()})
    print(sentence)
    return 0


def commit() -> str:
    """Short commit of the code, with "+changes" if a tracked file of src/ differs; "unknown" without git."""
    words = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", "src"])
    found = [subprocess.run(["git", *each], cwd=_ROOT, capture_output=True, text=True) for each in words]
    if any(each.returncode for each in found):
        return "unknown"
    return found[0].stdout.strip() + ("+changes" if found[1].stdout.strip() else "")


def _last_byte(path: Path, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(end - 1)
        return file.read(1)
