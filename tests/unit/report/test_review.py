"""What a review has of a list: which rows, their complete texts, and the rows that are only named."""

import json

import pytest
from support.sifted_pools import LIMITS, save_pool, save_sifting

from siftune.base.work_folder import record_text
from siftune.data.decisions import Decision, decisions_csv, read_decisions
from siftune.data.read import load_rows
from siftune.report.page import make_page, sections
from siftune.report.review import MOST
from siftune.report.subjects import find_subjects


def review(*names):
    return next(section for section in sections(find_subjects([*map(str, names)])) if section.review)


def save_list(path, rows, reason="loss 7.0"):
    """A list of `siftune rows`: of (place, prompt, completion)."""
    lines = [Decision(place, False, [7.0], "s", prompt, completion, reason) for place, prompt, completion in rows]
    path.write_text(decisions_csv(lines, with_reason=True), encoding="utf-8")
    return path


def save_rows(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def corrected(row, text):
    before, after = row["around"]
    return before + json.dumps(text) + after


# --- which rows


def test_all_rows_of_a_small_pool_are_there_in_their_order(tmp_path):
    folder = save_sifting(tmp_path / "sifted", save_pool(tmp_path / "pool.jsonl", 60))
    data = review(folder).review
    numbers = [row["fields"][2:4] for row in data["rows"]]
    selected = [row["selected"] for row in data["rows"]]
    assert (len(numbers), data["total"], data["others"]) == (60, 60, [])
    limit = selected.index(False)
    assert not any(selected[limit:])
    scores = [float(score) for score, _ in numbers if score]
    assert scores == sorted(scores)
    similar = [-float(similarity) for score, similarity in numbers if not score]
    assert similar == sorted(similar)
    parts = dict(data["parts"])
    assert parts["around the limit"] == [*range(max(0, limit - 25), min(60, limit + 25))]
    assert parts["other tasks, most similar prompts"] == [*range(40, 60)]
    assert parts["end of the order"] == [*range(35, 60)]


def test_rows_around_the_limit_are_those_with_the_nearest_scores(tmp_path):
    folder = save_sifting(tmp_path / "sifted", save_pool(tmp_path / "pool.jsonl", 240), rare=5)
    data = review(folder).review
    scores = [float(row["fields"][2]) for row in data["rows"] if row["fields"][2]]
    assert scores == sorted(scores)
    shown = [data["rows"][at] for at in dict(data["parts"])["around the limit"]]
    assert [float(row["fields"][2]) <= LIMITS[0] for row in shown] == [True] * 25 + [False] * 25
    assert {row["selected"] for row in shown[25:]} == {False, True}
    assert [bool(row["reason"]) for row in shown] == [not row["selected"] for row in shown]


def test_of_a_large_pool_the_others_are_named_if_they_are_left_out(tmp_path):
    folder = save_sifting(tmp_path / "sifted", save_pool(tmp_path / "pool.jsonl", 3000))
    section = review(folder)
    data = section.review
    on_page = {row["fields"][0]: row["selected"] for row in data["rows"]}
    named = {file + number for file, numbers in data["others"] for number in numbers}
    decisions = read_decisions(str(folder / "scores.csv")).selected
    assert len(on_page) == MOST
    assert not named & on_page.keys()
    assert named | {place for place, selected in on_page.items() if not selected} == {
        place for place, selected in decisions.items() if not selected
    }
    assert len(data["others"]) == 1
    assert section.words[0].startswith("The page has 1,000 of 3,000 rows")
    limit = [*on_page.values()].index(False)
    assert dict(data["parts"])["around the limit"] == [*range(limit - 25, limit + 25)]
    assert len(make_page([str(folder)]).html) < 2e6


def test_a_long_list_begins_on_the_page_and_is_complete_in_the_file(tmp_path):
    rows = [(f"/data/rows.jsonl:{number}", "x", "y") for number in range(1, MOST + 4)]
    data = review(save_list(tmp_path / "suspects.csv", rows)).review
    assert [row["fields"][0] for row in data["rows"]] == [place for place, *_ in rows[:MOST]]
    assert data["others"] == [("/data/rows.jsonl:", ["1001", "1002", "1003"])]


def test_a_row_is_described(tmp_path):
    pool = save_rows(tmp_path / "rows.jsonl", [{"prompt": "2 + 2?", "completion": "5"}])
    path = save_list(tmp_path / "suspects.csv", [(f"{pool}:1", "2 + 2?", "5")], reason="=1+1")
    (row,) = review(path).review["rows"]
    assert {name: row[name] for name in ("about", "numbers", "reason", "prompt", "completion", "selected")} == {
        "about": "1 · rows.jsonl:1", "numbers": "score 7.00, s", "reason": "=1+1", "prompt": "2 + 2?",
        "completion": "5", "selected": False,
    }  # fmt: skip
    assert row["fields"] == (f"{pool}:1", "no", "7.00000", "s", "2 + 2?", "5", "'=1+1")


# --- complete texts, and rows with another completion

RECORDS = (
    {"prompt": "2 + 2?", "completion": "5", "source": "a", "id": 12345678901234567890},
    {"id": 1, "completion": "5", "prompt": "5", "text": "5"},
    {"prompt": [{"role": "user", "content": "2?"}], "completion": [{"role": "assistant", "content": "5"}]},
    {"messages": [{"role": "user", "content": "5"}, {"role": "assistant", "content": "5"}], "n": 1.0},
    {"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "5", "weight": 1}]},
    {"messages": [{"role": role, "content": "5"} for role in ("user", "assistant", "user", "user")]},
    {"instruction": "add", "input": "2 2", "output": "5", "text": "x"},
    {"text": "5"},
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: next(iter(record)))
def test_only_the_completion_changes_in_a_corrected_row(tmp_path, record):
    rows = save_rows(tmp_path / "rows.jsonl", [record])
    (before,) = load_rows(str(rows))
    prompt = "\n".join(turn.content for turn in before.prompt)
    path = save_list(tmp_path / "suspects.csv", [(f"{rows}:1", prompt, "5")])
    (row,) = review(path).review["rows"]
    text = 'four "4"\n</script>'
    (tmp_path / "corrected.jsonl").write_text(corrected(row, text) + "\n")
    (after,) = load_rows(str(tmp_path / "corrected.jsonl"))
    assert (after.prompt, after.completion, after.extra) == (before.prompt, text, before.extra)
    assert corrected(row, "5") == json.dumps(record)


def test_columns_keep_their_names(tmp_path):
    pool = save_rows(tmp_path / "pool.jsonl", [{"question": "2?", "answer": "5", "completion": "5"}])
    folder = save_sifting(tmp_path / "sifted", save_pool(tmp_path / "other.jsonl", 30))
    decision = Decision(f"{pool}:1", True, [1.0, 0.9], "a", "2?", "5")
    (folder / "scores.csv").write_text(decisions_csv([decision], ["score", "similarity"]))
    record = json.loads((folder / "sift.json").read_text())
    facts = record["facts"] | {"columns": ["prompt=question", "completion=answer"]}
    (folder / "sift.json").write_text(record_text(facts, record["state"]))
    (row,) = review(folder).review["rows"]
    assert json.loads(corrected(row, "4")) == {"question": "2?", "answer": "4", "completion": "5"}


def test_texts_that_the_list_cuts_are_complete_on_the_page(tmp_path):
    pool = save_pool(tmp_path / "pool.jsonl", 30, long=500)
    folder = save_sifting(tmp_path / "sifted", pool)
    section = review(folder)
    assert all(row["fields"][5].endswith("…") for row in section.review["rows"])
    records = [json.loads(line) for line in pool.read_text().splitlines()]
    for row in section.review["rows"]:
        record = records[int(row["fields"][0].rpartition(":")[2]) - 1]
        assert (row["prompt"], row["completion"]) == (record["prompt"], record["completion"])
        assert json.loads(corrected(row, record["completion"])) == record
    assert "cannot be corrected" not in " ".join(section.words)


def test_a_row_that_has_changed_since_is_not_corrected(tmp_path):
    """Line 2 has another completion, and line 3 is gone."""
    rows = save_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "completion": f"{n}"} for n in (1, 2, 3)])
    path = save_list(tmp_path / "suspects.csv", [(f"{rows}:{n}", f"{n}?", f"{n}") for n in (1, 2, 3)])
    save_rows(rows, [{"prompt": f"{n}?", "completion": f"{n * n}"} for n in (1, 2)])
    section = review(path)
    assert [row["around"] is None for row in section.review["rows"]] == [False, True, True]
    assert f"2 rows of {rows} have changed" in section.words[-1]
    assert section.review["rows"][1]["completion"] == "2"


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_file_that_cannot_be_read(tmp_path, damage):
    rows = save_rows(tmp_path / "rows.json", [{}])
    path = save_list(tmp_path / "suspects.csv", [(f"{rows} row 1", "1?", "1")])
    rows.unlink() if damage == "gone" else rows.write_text("[")
    (row,) = review(path).review["rows"]
    assert (row["prompt"], row["around"]) == ("1?", None)
    assert ("is no file here" if damage == "gone" else "cannot be read: ") in review(path).words[-1]


def test_a_very_long_row_is_cut_and_not_corrected(tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", [{"prompt": "x" * 10_000, "completion": "1"}])
    section = review(save_list(tmp_path / "suspects.csv", [(f"{rows}:1", "x" * 10_000, "1")]))
    (row,) = section.review["rows"]
    assert row["around"] is None
    assert "more than 10,000 characters" in section.words[-1]


def test_texts_that_a_spreadsheet_would_compute(tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", [{"prompt": "=1+1", "completion": "-2\r\n"}])
    path = save_list(tmp_path / "suspects.csv", [(f"{rows}:1", "=1+1", "-2\r\n")])
    (row,) = review(path).review["rows"]
    assert (row["fields"][4], row["prompt"], row["completion"]) == ("'=1+1", "=1+1", "-2\r\n")
    (row,) = review(save_list(tmp_path / "other.csv", [("/gone.jsonl:1", "=1+1", "-2")])).review["rows"]
    assert (row["prompt"], row["completion"]) == ("=1+1", "-2")


def test_columns_without_names_stay(tmp_path):
    """A spreadsheet may write commas at the end of all lines."""
    path = save_list(tmp_path / "suspects.csv", [(f"{tmp_path}/rows.jsonl:1", "2?", "5")])
    path.write_text("".join(f"{line},,\n" for line in path.read_text().splitlines()))
    (row,) = review(path).review["rows"]
    assert len(row["fields"]) == len(path.read_text().partition("\n")[0].split(","))


def test_the_key_is_that_of_the_content(tmp_path):
    one = save_list(tmp_path / "a.csv", [("/gone.jsonl:1", "x", "y")])
    keys = [review(path).review["key"] for path in (one, save_list(tmp_path / "b.csv", [("/gone.jsonl:1", "x", "y")]))]
    assert keys[0] == keys[1]
    assert review(save_list(one, [("/gone.jsonl:1", "x", "z")])).review["key"] != keys[0]
