"""siftune's commands, run in this process as a user types them in a folder of files.

    commands = Commands()
    commands.run("train", "--train", "pool.jsonl", "--target", "few.jsonl", "--sift", "--out", "run")

A recorded line has the commands as text, with paths shortened to the names of files.
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lab.models import source
from siftune.base.errors import SiftuneError
from siftune.cli.main import main
from siftune.cli.subjects import find_subject, load_subject
from siftune.recipe.schema import Recipe
from siftune.sifting import sift as sifting


class CommandError(SiftuneError):
    """A command that failed, after its own message."""


class Commands:
    """Commands of a job.

    Attributes:
        texts: The commands that ran, as text.
        seconds: Processor seconds of all of them.
        sifted: Result of the last sifting among them, also of one within `siftune train`.
        sift_seconds: Processor seconds of that sifting.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.seconds = 0.0
        self.sifted: sifting.Sifted | None = None
        self.sift_seconds = 0.0

    def run(self, *words: str) -> None:
        """Run a command in the working directory.

        Raises:
            CommandError: It ended with another exit code than 0.
        """
        self.texts.append(shlex.join(["siftune", *(Path(word).name if "/" in word else word for word in words)]))
        started = time.process_time()
        # `siftune sift` and `siftune train --sift` both call it
        with patch.object(sifting, "sift_pool", self._timed_sift(sifting.sift_pool)):
            code = main(words)
        self.seconds += time.process_time() - started
        if code:
            raise CommandError(f"exit code {code}: {self.texts[-1]}")

    def _timed_sift(self, sift: Any) -> Any:
        def timed(*values: Any, **named: Any) -> sifting.Sifted:
            started = time.process_time()
            self.sifted = sift(*values, **named)
            self.sift_seconds = time.process_time() - started
            return self.sifted

        return timed


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words; True is a flag without a value.

    Example:
        >>> flags({"method": "gast", "gast.select": 0.5, "targets": ["q_proj", "v_proj"], "checkpointing": True})
        ['--method', 'gast', '--gast.select', '0.5', '--targets', 'q_proj', 'v_proj', '--checkpointing']
    """
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return words


def settings_of(job: Mapping[str, Any], template: str) -> list[str]:
    """Settings of a job that sifting and training share, as words."""
    own = {"lr": job["lr"], "batch-size": job["batch"], "seed": job["seed"]}
    return flags({"model": source(job["model"]), "template": template, **own})


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load_tuned(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a run folder, or of a model by its name, as `siftune eval` loads them."""
    subject = find_subject(name)
    return load_subject(subject, (subject.recipe or Recipe()).dtype)


def summary_of(run: str | Path) -> dict[str, Any]:
    """Summary of a finished run."""
    summary: dict[str, Any] = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))["summary"]
    return summary
