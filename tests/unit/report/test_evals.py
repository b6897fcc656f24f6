"""Metrics as a table, for one model and for two."""

from dataclasses import replace

from siftune.data.rows import rows_from
from siftune.evaluate.measure import MetricRow
from siftune.report.evals import Answer, Eval, digest_of_rows, metric_table, read_evals, record_eval
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


def test_another_measurement_on_the_same_rows_keeps_other_metrics_and_answers(tmp_path):
    answers = (Answer("1+1?", "2", "3", "2", False, True),)
    exact, loss, lower = (
        MetricRow("exact_match", 9, 0.5),
        MetricRow("perplexity", 9, 3.0),
        MetricRow("perplexity", 9, 2.0),
    )
    record_eval(tmp_path, Eval("a.jsonl", 9, 0.95, (exact, loss), answers, "same"))
    record_eval(tmp_path, Eval("/full/a.jsonl", 9, 0.95, (lower,), digest="same"))
    assert read_evals(tmp_path) == [Eval("/full/a.jsonl", 9, 0.95, (lower, exact), answers, "same")]
    record_eval(tmp_path, Eval("a.jsonl", 9, 0.9, (lower,), digest="same"))  # intervals of another level
    assert read_evals(tmp_path) == [Eval("a.jsonl", 9, 0.9, (lower,), digest="same")]


def test_a_measurement_on_a_part_of_the_rows_comes_first_and_is_replaced_by_one_on_all(tmp_path):
    whole, part, other = (
        Eval(f"{name}.jsonl", rows, 0.95, (MetricRow("perplexity", rows, 3.0),), digest=f"{name}{rows}")
        for name, rows in (("a", 9), ("a", 2), ("b", 4))
    )
    record_eval(tmp_path, part, is_part=True)
    assert read_evals(tmp_path) == [part]
    record_eval(tmp_path, whole)
    assert read_evals(tmp_path) == [whole]
    for _ in range(2):
        record_eval(tmp_path, part, is_part=True)
        assert read_evals(tmp_path) == [part, whole]
    record_eval(tmp_path, other)
    assert read_evals(tmp_path) == [part, whole, other]
    shorter = replace(whole, rows=8, digest="of the file as it is now")
    record_eval(tmp_path, shorter)
    assert read_evals(tmp_path) == [other, shorter]


def test_rows_with_another_answer_or_order_are_other_rows():
    one = {"prompt": "1+1?", "completion": "2"}
    kinds = [
        [one],
        [one, one],
        [{**one, "answer": "two"}],
        [{**one, "choices": ["2", "3"]}],
        [{**one, "completion": "3"}],
    ]
    digests = [digest_of_rows(rows_from(rows)) for rows in kinds]
    assert len({*digests}) == len(kinds)
    assert digest_of_rows(rows_from([one], "other")) == digests[0]
