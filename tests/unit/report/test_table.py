"""One table, three ways to write it."""

import io

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


def test_figures_stand_on_the_right_and_are_not_broken():
    columns = rich_table(TABLE).columns
    assert [column.justify for column in columns] == ["left", "right", "left"]
    assert [column.no_wrap for column in columns] == [False, True, False]
