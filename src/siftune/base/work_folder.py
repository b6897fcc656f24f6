"""Folders of resumable work: an interrupted command continues where it stopped, and never from other inputs."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from siftune.base.errors import InputError, RecipeError
from siftune.base.files import open_to_append, refuse_links, write_beside

logger = logging.getLogger(__name__)


class WorkFolder:
    """A folder of results, with a JSON file of the facts and the state that the results depend on.

    *Facts* are the inputs, by name: settings, digests of rows, the fingerprint of a model. Results of other facts are
    never reused and never deleted, since hours may be in them: `begin` refuses other facts by name. The *state* is
    whatever else a later call needs, such as a plan. Every file is written beside its place and then moved.

    As a context manager the folder removes itself if its block ends without results, or if its inputs are refused
    (`InputError`) in the call that created it.

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
        self._created = self._emptied = False

    def begin(self, facts: Mapping[str, Any]) -> Self:
        """Create the folder, or continue with its results if they are of the same facts.

        Facts of names that the folder does not have yet are added, so that `begin` can be called again.

        Args:
            facts: By the name that an error message calls them, of plain types.

        Raises:
            InputError: The folder holds a link, which could lead a write to a file elsewhere.
            RecipeError: A fact differs; the folder holds something else; or it cannot be written to.
        """
        facts = json.loads(json.dumps(facts))
        refuse_links(self.path)
        try:
            others = self.refuse_others()
            if self.has_results or self._created:
                before = self._read()
                self._refuse_other(before["facts"], facts)
                facts, state = {**before["facts"], **facts}, before["state"]
            else:
                self._created, self._emptied, state = True, not self.path.exists() or not others, {}
                self.path.mkdir(parents=True, exist_ok=True)
            self._write_record(facts, state)
        except OSError as error:
            raise RecipeError(f"{self.path} cannot be written to ({error.strerror}); give another folder") from error
        return self

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
        state: dict[str, Any] = self._read()["state"] if self._record.exists() else {}
        return state

    def set_state(self, **values: Any) -> None:
        """Replace or add values of the state, of plain types."""
        record = self._read()
        self._write_record(record["facts"], {**record["state"], **values})

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file in one move."""
        with write_beside(self.path / name) as [beside]:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to a file of JSON lines."""
        with open_to_append(self.path / name) as file:
            file.write(json.dumps(line) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file of JSON lines; a line that a crash cut off is dropped, in the file too."""
        path = self.path / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line for line in map(_parsed, text.splitlines()) if line is not None]
        dropped = len(text.splitlines()) - len(lines)
        if dropped or (text and not text.endswith("\n")):
            logger.warning("%s: %d damaged lines are dropped", path, dropped)
            self.write(name, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Self:
        """Enter the work."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the folder if there is nothing to continue with."""
        refused = kind is not None and issubclass(kind, InputError)
        if self._created and self._emptied and (refused or not self.has_results):
            self.remove()

    def _refuse_other(self, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        for name, new in facts.items():
            if name in before and before[name] != new:
                raise RecipeError(
                    f"{self.path} holds work in which {name} is {_shown(before[name])}, but now it is {_shown(new)}: "
                    f"set {name} as it was, or give another folder; to start again, delete this one"
                )

    def _write_record(self, facts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.write(self._record.name, json.dumps({"facts": facts, "state": state}, indent=2) + "\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            return {name: dict(record[name]) for name in ("facts", "state")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{self._record} cannot be read ({error}); give another folder, or delete it") from error


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _shown(value: Any) -> str:
    """A value in a message; the start of a hash."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else json.dumps(value)
