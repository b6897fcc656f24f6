"""Files and folders that are there whole or not at all, and what to say where the disk refuses.

Everything is written beside its place and moved there at the end. Also here, because every long piece of work below
the command line takes it: `Progress`.
"""

import contextlib
import errno
import hashlib
import logging
import os
import pickle
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from siftune.base.errors import InputError, ModelError, TrainingError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def write_beside(*places: Path) -> Iterator[list[Path]]:
    """Have files or folders written beside their places; they are moved there together at the end.

    After an error in the block nothing is moved, and nothing is left beside. What an earlier process left there is
    thrown away first. What is moved is on the disk itself before, so that a machine that loses power has the old or
    the new.

    Args:
        places: Files or folders in folders that exist; what is there is replaced.

    Yields:
        A path to write to for each of them.

    Raises:
        InputError: A folder stands where a file was to go; it is left alone.

    An error of the disk in the block, such as a full one, gets the name of the file as its attribute `filename`.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "run.json"
        >>> with write_beside(place) as [beside]:
        ...     _ = beside.write_text("{}")
        >>> [path.name for path in place.parent.iterdir()]
        ['run.json']
    """
    pairs = [(place.with_name(f".{place.name}.partial"), place) for place in places]
    for beside, _ in pairs:
        _remove(beside)
    try:
        yield [beside for beside, _ in pairs]
    except BaseException as error:
        beside, place = max(pairs, key=lambda pair: _changed(_newest(pair[0])))
        _name_file(error, place / _newest(beside).relative_to(beside))
        for beside, _ in pairs:
            _remove(beside)  # half an adapter, on what may be a full disk
        raise
    for beside, place in pairs:
        if place.is_dir() and not beside.is_dir():
            _remove(beside)
            raise InputError(f"{place} is a folder, and no file is put in its place; give another name")
        to_disk(beside)
        _swap(beside, place)
        to_disk(place.parent, all_in_it=False)


def _name_file(error: Any, file: Path) -> None:
    """Give an error of the disk the name of the file: a failed write does not tell, unlike a failed open."""
    of_disk = error.errno in _NO_ROOM if isinstance(error, OSError) else _disk_reason(error) is not None
    if of_disk and getattr(error, "filename", None) is None:
        error.filename = str(file)


def _newest(path: Path) -> Path:
    """The file of a folder that was written last, or what is no folder itself."""
    return max((each for each in path.rglob("*") if each.is_file()), key=_changed, default=path)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _swap(beside: Path, place: Path) -> None:
    """Move a file or folder to its place; no system replaces a full folder, so an old one goes aside first."""
    old = place.with_name(f".{place.name}.old")
    _remove(old)
    if place.is_dir():
        os.replace(place, old)
    os.replace(beside, place)
    _remove(old)


def to_disk(path: Path, all_in_it: bool = True) -> None:
    """Have the system write a file, or a folder and all that is in it, to the disk itself, out of its memory.

    Args:
        path: The file or folder.
        all_in_it: False: of a folder only the names.
    """
    if path.is_dir() and all_in_it:
        for part in path.iterdir():
            to_disk(part)
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_edited(path: Path, digest: str | None) -> None:
    """Rename a file that is about to be written again, unless its SHA-256 is that of the content that siftune wrote."""
    if not path.is_file() or hash_of(path) == digest:
        return
    names = (path.with_stem(f"{path.stem}.edited{number or ''}") for number in count())
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    logger.warning("%s was edited, or written by another command: it is now %s", path, kept)


def why_unreadable(error: BaseException) -> str:
    """What to say of a file of weights or state that could not be read, in one line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to run what is in the file
        return "it is damaged, or holds more than tensors and plain values, which could run code and is not read"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link itself: what a link points to is never touched."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def refuse_links(folder: Path) -> None:
    """Refuse a folder that holds a link, a pipe or a device, before anything in it is read or written.

    A folder that is missing passes. A folder from another party could otherwise direct what is written into it to any
    file of the user. The folder itself may be a link, since the user named it.

    Raises:
        InputError: The folder holds something other than files and folders, or cannot be read; the message names it.
    """

    def fail(error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and Path(error.filename) == folder:
            return  # nothing to look through
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); give another folder") from error

    for parent, folders, files in os.walk(folder, onerror=fail):
        for path in (Path(parent, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise InputError(
                    f"{path} is {kind}, which could lead to files elsewhere: remove it, or give another folder"
                )


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Lock a folder while the block runs, so that two processes do not mix their files in it; create it if missing.

    The system releases the lock if the process ends in any way. Windows has no such lock, and nothing is locked there.

    Raises:
        InputError: Another process has locked the folder.
        OSError: It cannot be created or locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    with ExitStack() as stack:
        while True:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another process is working in {folder}: wait until it ends, or give another folder with --out"
                ) from error
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                break
            folder.mkdir(parents=True, exist_ok=True)  # another process has removed it since it was opened
        yield


@contextmanager
def open_to_append(path: Path) -> Iterator[TextIO]:
    """Open a text file to add lines to, which is created if it is missing; a link is not followed.

    Raises:
        OSError: The file is a link (ELOOP), or cannot be written to; with the name of the file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag
    try:
        with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        _name_file(error, path)
        raise


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Give a folder to write to beside `out`; it becomes `out` at the end, or is removed after an error.

    Args:
        out: Folder that does not exist yet or is empty. Missing parents are made.

    Raises:
        ModelError: `out` is in use, or cannot be made; before anything is written.
    """
    place = Path(os.path.realpath(Path(out).expanduser()))  # neither "." nor a link can be replaced
    refuse_full(out)
    with write_beside(place) as [beside]:
        try:
            beside.mkdir(parents=True)
        except OSError as error:
            raise _unwritable(out, error) from error
        yield beside
        if place.exists():
            place.rmdir()  # fails where somebody filled it meanwhile


def refuse_full(out: str | Path) -> None:
    """Refuse a folder that is in use, or a file.

    Raises:
        ModelError: `out` exists and is no empty folder.
    """
    try:
        if Path(out).expanduser().exists() and any(Path(out).expanduser().iterdir()):
            raise ModelError(f"{out} is not empty; give another folder with --out")
    except OSError as error:
        raise _unwritable(out, error) from error


def writable_folder(path: Path) -> None:
    """Make a folder that work will be written to, and try a file in it.

    Raises:
        OSError: It cannot be made or written to.
    """
    path.mkdir(parents=True, exist_ok=True)
    with write_beside(probe := path / ".writable") as [beside]:
        beside.write_bytes(b"")
    probe.unlink()


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one sentence that names the file.

    Raises:
        TrainingError: Something in the block could not be written below `folder`.
    """
    try:
        yield
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        file = getattr(error, "filename", None) or _newest(folder)
        raise TrainingError(
            f"{file} cannot be written ({reason}): free some space, raise a limit on the size of files (`ulimit -f`), "
            f"or choose another disk with --out, and train again; --resume continues from the newest complete "
            f"checkpoint in {folder}, if there is one"
        ) from error


def _disk_reason(error: BaseException) -> str | None:
    """Why writing failed, or None where the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save names its own code, not the cause
    torch_words = ("inline_container.cc", "iostream error")
    return "a file could not be written to its end" if any(words in str(error) for words in torch_words) else None


def _unwritable(out: str | Path, error: OSError) -> ModelError:
    return ModelError(f"{out} cannot be written to ({error.strerror}); give another folder with --out")
