"""The consoles of commands, and the progress of stages of work: a bar on a terminal, a few lines elsewhere."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from siftune.base.files import Progress as Told


def text_console(stderr: bool = False) -> Console:
    """A console that prints text as is: no emojis for words between colons, no colours for numbers, no line breaks."""
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Told]:
    """Show progress while a block runs; a stage of which nothing can be counted has a total of 0."""
    with _bar(console) if console.is_terminal else _lines(console) as told:
        yield told


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Told]:
    """One bar that goes through the stages, and pulses where nothing is counted."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("", total=None)
        current = ""

        def told(stage: str, done: int, total: int) -> None:
            nonlocal current
            if stage != current:
                display.reset(task, total=total or None, description=stage)
                current = stage
            display.update(task, completed=done, total=total or None)

        yield told


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Told]:
    """A line for every stage, and for its quarters where they are counted."""
    last = ""

    def told(stage: str, done: int, total: int) -> None:
        nonlocal last
        line = f"{stage}: {done * 4 // total * 25} %" if total else stage
        if line != last:
            console.print(line, markup=False)
            last = line

    yield told
