"""Rows of the hub become lm-evaluation-harness's questions, and the files that offsite-tuning's tasks are tuned on."""

import json

import datasets
import pytest

from lab.reproduce.harness import HARNESS
from lab.reproduce.harness_rows import prepare_tasks, training_counts
from lab.reproduce.protocol import protocol_of
from lab.reproduce.rows import HUB
from siftune.base.errors import DataError

SUITE = protocol_of("gradot-opt-1.3b").suite
LABELLED = {"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B "}
ROWS = {  # row of the hub, prompt, options or accepted texts, the right one
    "openbookqa": ({"question_stem": "The sun is", **LABELLED}, "The sun is", [" x", " y"], 1),
    "piqa": ({"goal": "Fix it.", "sol1": "Glue. ", "sol2": "Tape.", "label": 0},
             "Question: Fix it.\nAnswer:", [" Glue.", " Tape."], 0),
    "arc_easy": ({"question": "Why?", **LABELLED}, "Question: Why?\nAnswer:", [" x", " y"], 1),
    "arc_challenge": ({"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
                      "Question: Why?\nAnswer:", [" x", " y"], 0),
    "hellaswag": (
        {"activity_label": "Sport", "ctx_a": "A man [title] runs.", "ctx_b": "he", "label": "1",
         "endings": ["falls  down.", "[step] stops.", "c", "d"]},
        "Sport: A man. runs. He", [" falls down.", " stops.", " c", " d"], 1,
    ),
    "sciq": ({"support": " Cells are small.", "question": "What?", "distractor1": "a", "distractor2": "b",
              "distractor3": "c", "correct_answer": "d"},
             "Cells are small.\nQuestion: What?\nAnswer:", [" a", " b", " c", " d"], 3),
    "web_questions": ({"question": "where?", "answers": ["Paris", "France"]},
                      "Question: where?\nAnswer:", ["Paris", "France"], 0),
    "race": ({"article": "Long.", "question": "What?", "options": ["a", "b", "c", "d"], "answer": "C"},
             "Article: Long.\n\nQuestion: What?\n\nAnswer:", [" a", " b", " c", " d"], 2),
}  # fmt: skip


@pytest.mark.parametrize("task", HARNESS)
def test_a_row_becomes_a_question(task):
    row, prompt, texts, right = ROWS[task]
    question = HARNESS[task].question(row)
    if task == "web_questions":
        assert question == {"prompt": prompt, "completion": " Paris", "accepted": texts}
    else:
        assert question == {"prompt": prompt, "completion": texts[right], "choices": texts, "answer": right}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_the_hub_and_of_a_folder_are_the_same_files(tmp_path, monkeypatch):
    rows = {
        "sciq": [{**ROWS["sciq"][0], "question": f"What {n}?"} for n in range(130)],
        "web_questions": [{**ROWS["web_questions"][0], "question": f"where {n}?"} for n in range(125)],
    }
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return rows[name.partition("/")[2]]

    monkeypatch.setattr(datasets, "load_dataset", load)
    tasks, one, other = ["sciq", "web_questions"], tmp_path / "one", tmp_path / "other"
    prepare_tasks(SUITE, tasks, HUB, one, limit=7, asked=2)
    assert asked == [
        (f"{owner}/{name}", None, part)
        for owner, name in (("allenai", "sciq"), ("stanfordnlp", "web_questions"))
        for part in ("train", "test")
    ]
    counts = {path.name: len(lines(path)) for path in one.iterdir()}
    assert counts == {
        "sciq.train.jsonl": 7, "sciq.heldout.jsonl": 120, "sciq.jsonl": 2, "web_questions.train.jsonl": 5,
        "web_questions.heldout.jsonl": 120, "web_questions.jsonl": 2, "calibration.jsonl": 12,
    }  # fmt: skip
    train, held = ({row["prompt"] for row in lines(one / f"sciq.{part}.jsonl")} for part in ("train", "heldout"))
    assert not train & held
    assert {row["prompt"] for row in lines(one / "calibration.jsonl")} > train
    folder = tmp_path / "rows"
    folder.mkdir()
    for task in tasks:
        (folder / f"{task}.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
        (folder / f"{task}.test.json").write_text(json.dumps(rows[task]))
    prepare_tasks(SUITE, tasks, str(folder), other, limit=7, asked=2)
    assert {path.name: path.read_text() for path in other.iterdir()} == {
        path.name: path.read_text() for path in one.iterdir()
    }
    assert training_counts(SUITE, tasks, str(folder), None) == {"sciq": 10, "web_questions": 5}
    assert training_counts(SUITE, ["race"], HUB, 9_000) == {"race": 9_000}
    prepare_tasks(SUITE, tasks, "nowhere", one, limit=7, asked=2)  # what is there is not fetched again


def test_what_is_missing_or_not_as_on_the_hub_is_told(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is no folder: give --data a folder with sciq\.train\.jsonl"):
        prepare_tasks(SUITE, ["sciq"], "nowhere", tmp_path / "out", None, None)
    with pytest.raises(DataError, match=r"has no train rows of sciq: put sciq\.train\.jsonl there, in the columns of"):
        prepare_tasks(SUITE, ["sciq"], str(tmp_path), tmp_path / "out", None, None)
    (tmp_path / "sciq.train.jsonl").write_text('{"question": "What?"}\n')
    with pytest.raises(DataError, match=r"sciq\.train\.jsonl row 1: it is not as allenai/sciq has its rows \(KeyError"):
        prepare_tasks(SUITE, ["sciq"], str(tmp_path), tmp_path / "out", None, None)
    (tmp_path / "sciq.train.jsonl").write_text(json.dumps(ROWS["sciq"][0]) + "\n")
    with pytest.raises(DataError, match=r"sciq has 1 training row, of which 120 are held out"):
        training_counts(SUITE, ["sciq"], str(tmp_path), None)
