import io
import json

import pytest
from rich.console import Console

from siftune.report.table import ResultTable, TableRow, plain_table, rich_table

PAIR = ResultTable(
    "run on data",
    [
        TableRow("exact_match", 200, 0.125, 0.5, 0.375, 0.301, 0.45, (0.1, 0.2), (0.4, 0.6)),
        TableRow("perplexity", 200, 12.3456, 4.0, -8.3456, -9.0, -7.25),
    ],
    level=0.9,
)
SINGLE = ResultTable(
    "model on data",
    [TableRow("choices", 8, 0.5, base_interval=(0.25, 0.75)), TableRow("perplexity", 8, 1234.5)],
)


def test_a_pair_as_lines():
    assert plain_table(PAIR).splitlines() == [
        "run on data",
        "metric       rows    base   tuned  difference   90 % interval",
        "exact match   200  12.5 %  50.0 %       +37.5  +30.1 to +45.0",
        "perplexity    200   12.35       4       -8.35     -9 to -7.25",
    ]


def test_one_model_as_lines():
    assert plain_table(SINGLE).splitlines() == [
        "model on data",
        "metric           rows   value     95 % interval",
        "multiple choice     8  50.0 %  25.0 % to 75.0 %",
        "perplexity          8    1234",
    ]


@pytest.mark.parametrize("table", [PAIR, SINGLE])
def test_the_terminal_shows_the_same_cells(table):
    box = io.StringIO()
    Console(file=box, width=120).print(rich_table(table))
    for cell in [table.title, *(text for row in table.cells() for text in row)]:
        assert cell in box.getvalue()


def test_plain_types():
    found = json.loads(json.dumps(PAIR.to_dict()))
    assert found["title"] == "run on data"
    assert found["rows"][0]["difference"] == 0.375
    assert found["rows"][1]["base_interval"] is None
