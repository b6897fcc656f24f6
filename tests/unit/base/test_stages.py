"""Stages as lines, and as a bar, by a clock that the tests set."""

import io

from rich.console import Console

from siftune.base.stages import stages


def shown(*told, terminal=None, names=()):
    """What a console shows of reports, each with the second at which it comes."""
    box, now = io.StringIO(), [0]
    with stages(Console(file=box, width=80, force_terminal=terminal), lambda: now[0], names) as tell:
        for now[0], *report in told:
            tell(*report)
    return box.getvalue()


def test_a_line_per_stage_one_for_its_time_and_one_in_ten_seconds():
    told = [(second, "losses", 8 * second, 1920) for second in range(26)]
    assert shown(*told, (26, "[b]", 0, 0), (99, "[b]", 0, 0), (100, "measuring", 0, 1)).splitlines() == [
        "losses: 0 of 1,920",
        "losses: 8 of 1,920, 3 min 59 s left",
        "losses: 88 of 1,920, 3 min 49 s left",
        "losses: 168 of 1,920, 3 min 39 s left",
        "[b]",
        "measuring",
    ]


def test_the_time_left_is_that_at_the_speed_of_this_call():
    """Rows that an earlier call has done took no time of this one."""
    assert shown((5, "losses", 1000, 1400), (25, "losses", 1200, 1400), (45, "losses", 1400, 1400)).splitlines() == [
        "losses: 1,000 of 1,400",
        "losses: 1,200 of 1,400, 20 s left",
        "losses: 1,400 of 1,400",
    ]


def test_the_time_before_the_first_report_is_repeated_does_not_count():
    """As that of reading prompts, before the first token is written."""
    told = [(0, "texts", 0, 400), (50, "texts", 0, 400), (53, "texts", 0, 400), (60, "texts", 200, 400)]
    assert shown(*told).splitlines() == [
        "texts: 0 of 400", "texts: 0 of 400", "texts: 200 of 400, 10 s left",
    ]  # fmt: skip


def test_a_stage_that_begins_again_has_a_speed_of_its_own():
    first = [(0, "rows", 0, 300), (40, "rows", 200, 300)]
    again = [(100, "rows", 0, 600), (110, "rows", 300, 600)]
    assert shown(*first, *again).splitlines() == [
        "rows: 0 of 300", "rows: 200 of 300, 20 s left", "rows: 0 of 600", "rows: 300 of 600, 10 s left",
    ]  # fmt: skip


def test_a_stage_of_less_than_ten_seconds_has_one_line():
    told = [(second, "losses", 100 * second, 900) for second in range(10)]
    assert shown(*told, (9, "end", 0, 0)).splitlines() == ["losses: 0 of 900", "end"]


def test_stages_are_numbered_if_all_are_known():
    told = [(0, "loading", 0, 0), (1, "costs", 0, 30), (2, "losses", 0, 0)]
    assert shown(*told, names=["rows", "costs", "losses"]).splitlines() == [
        "loading", "2 of 3: costs: 0 of 30", "3 of 3: losses",
    ]  # fmt: skip


def test_a_terminal_shows_the_stage_and_its_time_left_after_minutes_too():
    told = [(0, "losses", 0, 1536), (200, "losses", 512, 1536)]
    text = shown(*told, terminal=True)
    assert " 33%" in text
    assert "6 min 40 s left" in text
    text = shown(*told, (400, "[b]checking", 0, 0), terminal=True)
    assert "[b]checking" in text
    assert "left" not in text.rpartition("[b]checking")[2]
