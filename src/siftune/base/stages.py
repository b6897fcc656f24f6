"""The consoles of commands, and the progress of stages of work: a bar on a terminal, lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from siftune.base.files import Progress as Told
from siftune.base.text import duration

Clock = Callable[[], float]  # seconds from some moment on

_BETWEEN = 10.0  # seconds between two lines of a stage, at least


def text_console(stderr: bool = False) -> Console:
    """A console that prints text as is: no emojis for words between colons, no colours for numbers, no line breaks."""
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def stages(console: Console, clock: Clock = time.monotonic) -> Iterator[Told]:
    """Show progress while a block runs; a stage of which nothing can be counted has a total of 0."""
    with _bar(console, clock) if console.is_terminal else _lines(console, clock) as told:
        yield told


class _Pace:
    """The time left of a stage, at its speed since the first report: a stage that continues may begin late."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stage, self._last, self._first, self._began = "", 0, 0, 0.0

    def report(self, stage: str, done: int, total: int) -> tuple[bool, str]:
        """Whether a stage begins, perhaps with the name of the last one; and the time left as text, if it is known."""
        now, begins = self._clock(), stage != self._stage or done < self._last
        if begins:
            self._first, self._began = done, now
        self._stage, self._last = stage, done
        if not self._first < done < total:
            return begins, ""
        return begins, f"{duration((now - self._began) / (done - self._first) * (total - done))} left"


@contextlib.contextmanager
def _bar(console: Console, clock: Clock) -> Iterator[Told]:
    """One bar that goes through the stages, and pulses where nothing is counted."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    pace = _Pace(clock)
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("", total=None, left="")

        def told(stage: str, done: int, total: int) -> None:
            nonlocal task
            begins, left = pace.report(stage, done, total)
            if begins:
                display.remove_task(task)
                task = display.add_task(stage, total=total or None, left="")
            display.update(task, completed=done, left=left)

        yield told


@contextlib.contextmanager
def _lines(console: Console, clock: Clock) -> Iterator[Told]:
    """A line when another stage begins; where something is counted, also one at most every ten seconds."""
    pace, current, shown = _Pace(clock), "", 0.0

    def told(stage: str, done: int, total: int) -> None:
        nonlocal current, shown
        _, left = pace.report(stage, done, total)
        now = clock()
        if stage == current and (total < 2 or now - shown < _BETWEEN):
            return
        counts = [f"{stage}: {done:,} of {total:,}" if total > 1 else stage, *([left] if left else [])]
        console.print(", ".join(counts), markup=False)
        current, shown = stage, now

    yield told
