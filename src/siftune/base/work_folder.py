"""Folders of resumable work: an interrupted command continues where it stopped, and never from other inputs.

A folder has a JSON file of facts and state, its record, and may have files of JSON lines. Each has SHA-256 digests, by
which damage is noticed, not malice (ours). A damaged record is refused; damaged lines are dropped, to be computed
again.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from siftune.base.errors import InputError, RecipeError
from siftune.base.files import only_process, open_to_append, refuse_links, write_beside
from siftune.base.json_files import read_json_lines, read_sealed, sealed, unsealed

logger = logging.getLogger(__name__)

T = TypeVar("T")
_ADVICE = "give another folder, or delete this one to start again"


class Record(BaseModel):
    """Facts and state of a folder."""

    facts: dict[str, Any]
    state: dict[str, Any]


class WorkFolder:
    """A folder of results, with a JSON file of the facts and the state that the results depend on.

    *Facts* are the inputs, by name: settings, digests of rows, the fingerprint of a model. Results of other facts are
    never reused and never deleted, since hours may be in them: `begin` refuses other facts by name. The *state* is
    whatever else a later call needs, such as a plan. Every file is written beside its place and then moved.

    The folder is locked from `begin` to the end of its block. As a context manager it removes itself if its block ends
    without results, or if its inputs are refused (`InputError`) in the call that created it.

    Args:
        path: The folder; `begin` creates it.
        record: Name of the JSON file in it: {"facts": {...}, "state": {...}}.
        results: Glob patterns of the files that are results. A folder without any counts as empty.

    Example:
        >>> import tempfile
        >>> work = WorkFolder(Path(tempfile.mkdtemp()) / "work", "work.json", "*.txt")
        >>> with work.begin({"seed": 0}):
        ...     work.write("row.txt", "done")
        >>> work.has_results, WorkFolder(work.path, "work.json", "*.txt").begin({"seed": 0}).has_results
        (True, True)
    """

    def __init__(self, path: str | Path, record: str, *results: str) -> None:
        self.path = Path(os.path.abspath(Path(path).expanduser()))
        self._record, self._results = self.path / record, results
        self._created = self._emptied = self._locked = False
        self._depth = 0  # of nested blocks, of which the last ends the lock
        self._lock = ExitStack()

    def begin(self, facts: Mapping[str, Any]) -> Self:
        """Lock the folder, which is created if it is missing, and continue with its results if they are of these facts.

        Facts of names that the folder does not have yet are added, so that `begin` can be called again.

        Args:
            facts: By the name that an error message calls them, of plain types.

        Raises:
            InputError: The folder holds a link, which could lead a write to a file elsewhere; another process works in
                it; or its record is damaged.
            RecipeError: A fact differs; the folder holds something else; or it cannot be written to.
        """
        facts = json.loads(json.dumps(facts))
        refuse_links(self.path)
        was_locked = self._locked
        try:
            self._begin(facts)
        except BaseException as error:
            if not was_locked:
                self._release()
            if not isinstance(error, OSError):
                raise
            raise RecipeError(f"{self.path} cannot be written to ({error.strerror}); give another folder") from error
        return self

    def _begin(self, facts: Mapping[str, Any]) -> None:
        is_new = not self.path.exists()
        if not self._locked:
            self._lock.enter_context(only_process(self.path))
            self._locked = True
        others = self.refuse_others()
        if self.has_results or self._created:
            before = read_record(self._record)
            self._refuse_other(before.facts, facts)
            facts, state = {**before.facts, **facts}, before.state
        else:
            self._created, self._emptied, state = True, is_new or not others, {}
        self._write_record(facts, state)

    def refuse_others(self) -> list[str]:
        """Refuse a folder of something else; returns the names of files besides the record.

        Raises:
            RecipeError: The folder holds files, but no record.
        """
        inside = [part.name for part in self.path.iterdir()] if self.path.exists() else []
        others = [name for name in inside if name != self._record.name and not name.endswith(".partial")]
        if others and self._record.name not in inside:
            raise RecipeError(f"{self.path} is not empty, and holds no unfinished work: give another folder")
        return others

    @property
    def has_results(self) -> bool:
        """Whether the folder holds a result."""
        return any(True for pattern in self._results for _ in self.path.rglob(pattern))

    @property
    def state(self) -> dict[str, Any]:
        """The state; empty until it is set."""
        return read_record(self._record).state if self._record.exists() else {}

    def set_state(self, **values: Any) -> None:
        """Replace or add values of the state, of plain types."""
        record = read_record(self._record)
        self._write_record(record.facts, {**record.state, **values})

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file in one move."""
        with write_beside(self.path / name) as [beside]:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to a file of JSON lines."""
        with open_to_append(self.path / name) as file:
            file.write(_line_text(line))

    def lines(self, name: str, form: type[T]) -> list[T]:
        """Read a file of JSON lines; damaged ones are dropped, in the file too.

        Args:
            name: The file.
            form: The form of a line, as for `read_json`.

        Raises:
            InputError: The file cannot be read.
        """
        path = self.path / name
        lines, damaged = _read_lines(path, form)
        if damaged:
            logger.warning("%s: damaged lines are dropped, and computed again: %d", path, damaged)
            sound = (TypeAdapter(form).dump_python(line) for line in lines)
            self.write(name, "".join(map(_line_text, sound)))
        return lines

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._created = False  # another process may create it again

    def __enter__(self) -> Self:
        """Enter the work."""
        self._depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the folder if there is nothing to continue with, and end the lock."""
        refused = kind is not None and issubclass(kind, InputError)
        if self._created and self._emptied and (refused or not self.has_results):
            self.remove()
        self._created = False
        self._depth -= 1
        if not self._depth:
            self._release()

    def _release(self) -> None:
        self._lock.close()
        self._locked = False

    def _refuse_other(self, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        for name, new in facts.items():
            if name in before and before[name] != new:
                raise RecipeError(
                    f"{self.path} holds work in which {name} is {_shown(before[name])}, but now it is {_shown(new)}: "
                    f"set {name} as it was, or give another folder; to start again, delete this one"
                )

    def _write_record(self, facts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.write(self._record.name, record_text(facts, state))


def record_text(facts: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """The text of a record, with its digest."""
    return json.dumps(sealed({"facts": facts, "state": state}), indent=2) + "\n"


def _line_text(line: Mapping[str, Any]) -> str:
    """The text of a JSON line, with its digest."""
    return json.dumps(sealed(line)) + "\n"


def read_record(path: Path) -> Record:
    """Read the record of a work folder.

    Raises:
        InputError: It cannot be read, or was changed since it was written.
    """
    return read_sealed(path, Record, _ADVICE)


def _read_lines(path: Path, form: type[T]) -> tuple[list[T], int]:
    """Read a file of JSON lines of a work folder, as `read_json_lines`; lines that were changed are damaged, too."""
    adapter, lines = TypeAdapter(form), list[T]()
    written, damaged = read_json_lines(path, dict[str, Any], _ADVICE)
    for values in map(unsealed, written):
        with contextlib.suppress(ValidationError):
            lines += [] if values is None else [adapter.validate_json(json.dumps(values), strict=True)]
    return lines, damaged + len(written) - len(lines)


def _shown(value: Any) -> str:
    """A value in a message; the start of a hash."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else json.dumps(value)
