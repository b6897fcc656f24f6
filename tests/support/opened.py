"""Which files of a folder are opened, and how often, by Python or by safetensors."""

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path

_watched: list[tuple[str, Counter]] = []


def _note(event, arguments):
    if event == "open" and _watched and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        for folder, counts in _watched:
            if os.path.dirname(path) == folder:
                counts[os.path.basename(path)] += 1


sys.addaudithook(_note)  # it cannot be taken off, so it looks at nothing while nobody watches


@contextlib.contextmanager
def opened(folder, monkeypatch):
    """Count how often each file of a folder is opened in the block; safetensors, whose Rust no hook sees, may not."""

    def refuse(name, *arguments, **options):
        assert Path(name).parent.absolute() != Path(folder).absolute(), f"safetensors opens {name}"
        return original(name, *arguments, **options)

    import safetensors.torch

    original, counts = safetensors.torch.safe_open, Counter()
    monkeypatch.setattr(safetensors.torch, "safe_open", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    _watched.append((os.path.abspath(folder), counts))
    try:
        yield counts
    finally:
        _watched.pop()
        monkeypatch.undo()
