"""Hostile copies of sound folders: a file is replaced or edited, the hashes are repaired, and a reader must refuse."""

import json
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.kits import copied, repair

from siftune.base.errors import KitError
from siftune.offsite.kit.manifest import canonical

Reader = Callable[[Path], Any]
REMOVED = object()  # the value of a key or a file that is taken away


def forge(sound: Path, place: Path, name: str, path: str, value: Any) -> Path:
    """Copy a folder, change one file in it, and repair sizes and hashes in its manifest.

    Args:
        sound: The folder, which remains as it is.
        place: Folder for the copy, which has the name of the original.
        name: The file.
        path: Keys to a value of its JSON, or of its header in JSON, with slashes between them; "" for the file itself.
        value: New value, `REMOVED`, or a function of the old one. Of a file it is bytes.
    """
    folder = copied(sound, place / sound.name)
    file = folder / name
    data = file.read_bytes() if file.is_file() else b""
    if not path:
        new = value(data) if callable(value) else value
    elif name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        text = json.dumps(_edited(json.loads(data[8 : 8 + length]), path, value)).encode()
        new = len(text).to_bytes(8, "little") + text + data[8 + length :]
    else:
        new = canonical(_edited(json.loads(data), path, value))
    file.unlink(missing_ok=True)
    if new is not REMOVED:
        file.write_bytes(new)
    if name != "manifest.json":
        repair(folder)
    return folder


def _edited(tree: Any, path: str, value: Any) -> Any:
    *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    parent = tree
    for step in steps:
        parent = parent[step]
    if value is REMOVED:
        del parent[last]
    else:
        parent[last] = value(parent[last]) if callable(value) else value
    return tree


def refused(read: Reader, folder: Path, name: str, words: str | None = None) -> None:
    """Read a hostile folder: a KitError in one line, which names the file and matches, and nothing is written."""
    before = _stamps(folder.parent)
    with pytest.raises(KitError, match=words) as caught:
        read(folder)
    _check_message(str(caught.value), folder, name)
    assert _stamps(folder.parent) == before


def _check_message(message: str, folder: Path, name: str) -> None:
    assert message.startswith((f"kit {folder}: ", f"return {folder}: "))
    assert name in message.replace(str(folder), "")
    assert message.endswith("; ask whoever made it for a sound copy")
    assert message.isprintable()
    assert len(message) < 700 + 2 * len(str(folder))


def _stamps(place: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of change of everything below a folder."""
    entries = {str(path): path.lstat() for path in place.rglob("*")}
    return {name: (entry.st_mode, entry.st_size, entry.st_mtime_ns) for name, entry in entries.items()}


MEMORY_MB = 1000  # that a bomb may take in the process that reads it, above the memory of the tests
SECONDS = 20  # of its processor time; processes that it starts have limits of their own
CLOCK_SECONDS = 240  # on the clock, on a machine with other work


def defused(read: Reader, folder: Path, name: str, words: str) -> None:
    """As `refused`, in a process with limits on memory, time, and the size of files."""
    before = _stamps(folder.parent)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_read_limited, args=(read, folder, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(CLOCK_SECONDS), "the bomb does not end"
        kind, message = ours.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the process died of the bomb, with code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    assert kind == "KitError", message
    assert re.search(words, message), message
    _check_message(message, folder, name)
    assert _stamps(folder.parent) == before


def _read_limited(read: Reader, folder: Path, pipe: Any) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_MB * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    seconds = int(time.process_time()) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        read(folder)
        pipe.send(("nothing", "it was read"))
    except BaseException as error:  # a panic in Rust is no Exception
        pipe.send((type(error).__name__, str(error)))
    os._exit(0)
