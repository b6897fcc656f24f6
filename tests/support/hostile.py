"""Hostile copies of sound folders: a file is replaced or edited, the hashes are repaired, and a reader must refuse."""

import json
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
