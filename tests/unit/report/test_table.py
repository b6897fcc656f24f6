"""One table, three ways to write it."""

import io
import re

import pytest
from rich.console import Console

from siftune.report.table import Table, markdown_table, plain_table, print_table, rich_table

TABLE = Table(
    ["method", "loss", "kind"],
    [["dense", "0.5", "all layers"], ["[ist]", "12.25", "few"]],
    title="two runs [of many]",
    words=(0, 2),
)


def test_lines():
    assert plain_table(TABLE).splitlines() == [
        "two runs [of many]",
        "method   loss  kind",
        "dense     0.5  all layers",
        "[ist]   12.25  few",
    ]


def test_markdown():
    assert markdown_table(TABLE).splitlines() == [
        "| method | loss | kind |",
        "|---|---:|---|",
        "| dense | 0.5 | all layers |",
        "| [ist] | 12.25 | few |",
    ]


def test_a_table_without_rows_or_title():
    empty = Table(["a", "b"], [])
    assert plain_table(empty) == "a  b"
    assert markdown_table(empty) == "| a | b |\n|---|---:|"


def shown(width=120, **options):
    box = io.StringIO()
    print_table(TABLE, Console(file=box, width=width, **options))
    return box.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_every_cell_is_shown_as_it_is(terminal):
    written = shown(force_terminal=terminal, no_color=True)
    for cell in [TABLE.title, *TABLE.header, *(text for row in TABLE.rows for text in row)]:
        assert cell in written
    assert ("─" in written) is terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_control_characters_are_written_out(terminal):
    box, attack = io.StringIO(), "\x1b[2J"
    console = Console(file=box, width=120, force_terminal=terminal, no_color=True, highlight=False)
    print_table(Table([f"{attack}a"], [[f"{attack}b"]], f"{attack}c"), console)
    assert all(f"\\x1b[2J{cell}" in box.getvalue() for cell in "abc")
    assert attack not in box.getvalue()


def test_figures_stand_on_the_right_and_are_not_broken():
    columns = rich_table(TABLE).columns
    assert [column.justify for column in columns] == ["left", "right", "left"]
    assert [column.no_wrap for column in columns] == [True, True, False]


def test_on_a_narrow_terminal_words_are_folded_and_nothing_is_cut():
    narrow = Table(["place", "text"], [["rows.jsonl:5", "Donaudampfschifffahrtsgesellschaft und mehr"]], words=(0, 1))
    written = io.StringIO()
    print_table(narrow, Console(file=written, width=34, force_terminal=True, no_color=True))
    assert "…" not in written.getvalue()
    assert " rows.jsonl:5 " in written.getvalue()
    said = "".join(written.getvalue().replace("rows.jsonl:5", "").split())
    assert said.endswith("Donaudampfschifffahrtsgesellschaftundmehr")
    assert all(len(re.sub(r"\x1b\[\d*m", "", line)) <= 34 for line in written.getvalue().splitlines())
    long = Table(["place"], [["a/very/long/path/to/a/file/rows.jsonl:5"]])
    assert not rich_table(long).columns[0].no_wrap


def test_wide_characters_take_two_columns():
    lines = plain_table(Table(["a", "n"], [["数字", "1"], ["abc", "2"]])).splitlines()
    assert lines == ["a     n", "数字  1", "abc   2"]
