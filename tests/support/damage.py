"""Damage to folders, JSON and bytes, for fuzz tests."""

import copy
import json
import os
import shutil

from support.kits import repair

from siftune.base.errors import KitError
from siftune.offsite.kit.manifest import canonical

NESTED, NAN = "@nested@", "@nan@"  # put in by `dump`, since no writer would
JUNK = (None, True, -1, 0, 10**9, 10**30, 1.5, NAN, "", "../x", "/etc/passwd\0", [], {}, [[]], {"a": 1}, NESTED)


class Subject:
    """A folder to damage again and again.

    Args:
        folder: A copy of a sound one.
        read: What must refuse it.
    """

    def __init__(self, folder, read):
        self.folder, self.read = folder, read
        self.files = sorted(path.name for path in folder.iterdir())
        self.tried = 0
        self._changed = set()
        self._sound = {name: (folder / name).read_bytes() for name in self.files}

    def outcome(self):
        """Read the damaged folder, check that reading changed nothing, and put it right again.

        Returns:
            What was read; None if it was refused.
        """
        before, around = stamps(self.folder), os.listdir(self.folder.parent)
        self.tried += 1
        found = complaint = None
        try:
            found = self.read(self.folder)
        except KitError as error:
            complaint = str(error)
        assert complaint is None or (complaint.startswith(("kit ", "return ")) and complaint.isprintable())
        assert complaint is None or len(complaint) < 1000 + len(str(self.folder))
        assert stamps(self.folder) == before
        assert os.listdir(self.folder.parent) == around
        return found

    def refused(self, what):
        """Read the damaged folder, which must be refused."""
        assert self.outcome() is None, what
        self.restore()

    def restore(self):
        """Put the folder right again."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink() or path.name not in self._sound or not path.is_file():
                path.unlink()
        for name, data in self._sound.items():
            if name in self._changed or not (self.folder / name).exists():
                (self.folder / name).write_bytes(data)
        self._changed.clear()

    def sound(self, name):
        """Bytes of an undamaged file."""
        return self._sound[name]

    def put(self, name, data):
        """Change a file."""
        (self.folder / name).write_bytes(data)
        self._changed.add(name)

    def repair(self):
        """Bring the manifest in line with the files."""
        repair(self.folder)
        self._changed.add("manifest.json")


def stamps(folder):
    """Name -> kind, size and time of change, of what is in a folder."""
    found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    return {name: (info.st_mode, info.st_size, info.st_mtime_ns) for name, info in found.items()}


def dump(value):
    """Canonical JSON, with what no JSON has."""
    text = canonical(value).replace(f'"{NAN}"'.encode(), b"NaN")
    return text.replace(f'"{NESTED}"'.encode(), b"[" * 100_000 + b"]" * 100_000)


def places(value, path=()):
    """Paths of every value in a tree of JSON."""
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(child, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def with_value(whole, path, new):
    """A tree with one value replaced."""
    if not path:
        return new
    whole = copy.deepcopy(whole)
    at(whole, path[:-1])[path[-1]] = new
    return whole


def mutations(whole, among=lambda path: True):
    """Every value replaced, every key removed or renamed, one added to every object, items to and from every list.

    Args:
        whole: A tree of JSON.
        among: Which paths are touched.

    Yields:
        What was done, and the tree.
    """
    for path in filter(among, places(whole)):
        old = at(whole, path)
        for new in JUNK:
            if json.dumps(new) != json.dumps(old):
                yield f"{path} = {new!r}", with_value(whole, path, new)
        if isinstance(old, dict):
            yield f"{path} more", with_value(whole, path, {**old, "x": 1})
        if isinstance(old, list):
            yield f"{path} longer", with_value(whole, path, [*old, *(old or [1])])
            yield from [(f"{path} shorter", with_value(whole, path, old[:-1]))] * bool(old)
        if path and isinstance(path[-1], str):
            parent = {key: child for key, child in at(whole, path[:-1]).items() if key != path[-1]}
            yield f"{path} gone", with_value(whole, path[:-1], parent)
            yield f"{path} renamed", with_value(whole, path[:-1], {**parent, path[-1] + "_": old})


def some_of(names, generator, count=2):
    """A filter of paths: of a hundred like tensors a few are enough."""
    left = set(names) - set(generator.sample(sorted(names), count))
    return lambda path: not left.intersection(path)


def byte_mutations(data, generator, count):
    """Bits flipped anywhere, the first kilobyte preferred; pieces cut out, doubled, put behind or in front."""
    for turn in range(count):
        place = generator.randrange(min(len(data), 1000) if turn % 2 else len(data))
        yield f"bit at {place}", data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :]
    for _ in range(count // 3):
        start, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
        if start < end:
            yield f"cut {start}:{end}", data[:start] + data[end:]
            yield f"doubled {start}:{end}", data[:end] + data[start:]
        yield f"ends at {start}", data[:start]
    yield from (("empty", b""), ("more", data + b"\0"), ("in front", b" " + data), ("twice", data * 2))
