"""Metrics as a table, for one model and for two."""

from siftune.evaluate.measure import MetricRow
from siftune.report.evals import metric_table
from siftune.report.table import plain_table

PAIR = metric_table(
    "run on data",
    [
        MetricRow("exact_match", 200, 0.125, 0.5, 0.375, 0.301, 0.45, (0.1, 0.2), (0.4, 0.6)),
        MetricRow("perplexity", 200, 49859.2, 4.0, -49855.2, -9.0, 7.25),
    ],
    level=0.9,
)
SINGLE = metric_table(
    "model on data",
    [MetricRow("choices", 8, 0.5, base_interval=(0.25, 0.75)), MetricRow("perplexity", 8, 1234.5)],
)


def test_a_pair_as_lines():
    assert plain_table(PAIR).replace("\u00a0", " ").splitlines() == [
        "run on data",
        "metric       rows    base   tuned  difference   90 % interval",
        "exact match   200  12.5 %  50.0 %       +37.5  +30.1 to +45.0",
        "perplexity    200  49,859   4.000     −49,855  −9.00 to +7.25",
    ]


def test_one_model_as_lines():
    assert plain_table(SINGLE).replace("\u00a0", " ").splitlines() == [
        "model on data",
        "metric           rows   value     95 % interval",
        "multiple choice     8  50.0 %  25.0 % to 75.0 %",
        "perplexity          8   1,234",
    ]
