"""Stages as lines, and as a bar."""

import io

from rich.console import Console

from siftune.base.stages import stages


def lines(*told):
    box = io.StringIO()
    with stages(Console(file=box, width=80)) as tell:
        for stage, done, total in told:
            tell(stage, done, total)
    return box.getvalue().splitlines()


def test_a_line_per_quarter_and_stage():
    told = [("calibration", done, 8) for done in range(9)]
    assert lines(*told, ("[b]", 0, 0), ("[b]", 0, 0), ("end", 3, 3)) == [
        *(f"calibration: {share} %" for share in (0, 25, 50, 75, 100)), "[b]", "end: 100 %",
    ]  # fmt: skip


def test_a_terminal_shows_the_stage_and_leaves_nothing():
    box = io.StringIO()
    with stages(Console(file=box, width=80, force_terminal=True)) as tell:
        tell("calibration", 1, 2)
        tell("checking", 0, 0)
    assert "checking" in box.getvalue()
