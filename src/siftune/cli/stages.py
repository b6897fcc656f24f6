"""What a user sees of work that goes through stages: a bar on a terminal, a few lines elsewhere."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from siftune.files import Progress as Told


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Told]:
    """Show progress while a block runs."""
    with _bar(console) if console.is_terminal else _lines(console) as told:
        yield told


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Told]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("", total=None)
        current = ""

        def told(stage: str, done: int, total: int) -> None:
            nonlocal current
            if stage != current:
                display.reset(task, total=total, description=stage)
                current = stage
            display.update(task, completed=done, total=total)

        yield told


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Told]:
    """A line at the end of every stage, and for its other quarters."""
    last = ""

    def told(stage: str, done: int, total: int) -> None:
        nonlocal last
        quarter = done * 4 // max(1, total)
        line = f"{stage}: {quarter * 25} %"
        if quarter and line != last:
            console.print(line, markup=False)
            last = line

    yield told
