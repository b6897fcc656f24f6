"""The consoles of commands, and the progress of stages of work: a bar on a terminal, lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from siftune.base.files import Progress as Told
from siftune.base.text import duration

Clock = Callable[[], float]  # seconds from some moment on

BETWEEN = 10.0  # seconds between two lines of a stage; a report that comes later makes them more


def text_console(stderr: bool = False) -> Console:
    """A console that prints text as is: no emojis for words between colons, no colours for numbers, no line breaks."""
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def stages(console: Console, clock: Clock = time.monotonic, names: Sequence[str] = ()) -> Iterator[Told]:
    """Show progress while a block runs; a stage of which nothing can be counted has a total of 0.

    Args:
        console: Where to show it.
        clock: For the time left.
        names: Stages in their order, if all are known before: their lines then begin with a number, as "2 of 4: ".
    """

    def numbered(stage: str, done: int, total: int) -> None:
        report(f"{names.index(stage) + 1} of {len(names)}: {stage}" if stage in names else stage, done, total)

    with _bar(console, clock) if console.is_terminal else _lines(console, clock) as report:
        yield numbered


class _Pace:
    """The time left of a stage, at its speed since the first report: a stage that continues may begin late.

    A stage that prepares something first repeats its first report after that, whose time then does not count.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stage, self._last, self._first, self._began, self._reports = "", 0, 0, 0.0, 0

    def report(self, stage: str, done: int, total: int) -> tuple[bool, float | None]:
        """Whether a stage begins, perhaps with the name of the last one; and the seconds left, if they are known."""
        now, begins = self._clock(), stage != self._stage or done < self._last
        self._reports = 1 if begins else self._reports + 1
        if begins or (self._reports == 2 and done == self._first):
            self._first, self._began = done, now
        self._stage, self._last = stage, done
        if not self._first < done < total:
            return begins, None
        return begins, (now - self._began) / (done - self._first) * (total - done)


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

        def report(stage: str, done: int, total: int) -> None:
            nonlocal task
            begins, left = pace.report(stage, done, total)
            if begins:
                display.remove_task(task)
                task = display.add_task(stage, total=total or None, left="")
            display.update(task, completed=done, left="" if left is None else f"{duration(left)} left")

        yield report


@contextlib.contextmanager
def _lines(console: Console, clock: Clock) -> Iterator[Told]:
    """A line when another stage begins, and every ten seconds; also as soon as the time left is known to be longer."""
    pace, current, shown, estimated = _Pace(clock), "", 0.0, False

    def report(stage: str, done: int, total: int) -> None:
        nonlocal current, shown, estimated
        begins, left = pace.report(stage, done, total)
        now, estimated = clock(), estimated and not begins
        first_estimate = not estimated and left is not None and left >= BETWEEN
        if stage == current and (total < 2 or (now - shown < BETWEEN and not first_estimate)):
            return
        counts = [f"{stage}: {done:,} of {total:,}" if total > 1 else stage]
        console.print(", ".join([*counts, *([] if left is None else [f"{duration(left)} left"])]), markup=False)
        current, shown, estimated = stage, now, estimated or left is not None

    yield report
