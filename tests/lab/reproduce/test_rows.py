"""The files that a protocol trains and asks on, from the hub and from a folder."""

import json

import datasets
import pytest

from lab.reproduce.protocol import protocol_of
from lab.reproduce.rows import HUB, prepare_files, trained_on, training_count
from siftune.base.errors import DataError

SUITE = protocol_of("commonsense-llama-7b").suite
TRAIN = [
    {
        "instruction": f"Q{n}?\n\nAnswer format: true/false",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    }
    for n in range(125)
]
BOOLQ = [{"question": f"is it {n}", "answer": n % 2 == 0, "passage": "long"} for n in range(5)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_the_hub_are_put_into_the_papers_words(tmp_path, monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return {"zwhe99/commonsense_170k": TRAIN, "google/boolq": BOOLQ}[name]

    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare_files(SUITE, ["boolq"], HUB, tmp_path, limit=3, asked=4)
    assert asked == [("zwhe99/commonsense_170k", None, "train"), ("google/boolq", None, "validation")]
    train, held, questions = (lines(tmp_path / f"{name}.jsonl") for name in ("train", "heldout", "boolq"))
    assert (len(train), len(held), len(questions)) == (3, 120, 4)
    texts = [row["prompt"] for row in [*train, *held]]
    assert len(set(texts)) == 123
    assert texts != sorted(texts)
    begins = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert questions[1] == {
        "prompt": f"{begins}\n\n### Instruction:\nPlease answer the following question with true or false, question: "
        "is it 1?\n\nAnswer format: true/false\n\n### Response:\n",
        "completion": "the correct answer is false", "answer": 1,
        "choices": ["the correct answer is true", "the correct answer is false"],
    }  # fmt: skip
    prepare_files(SUITE, ["boolq"], HUB, tmp_path, limit=3, asked=4)
    assert len(asked) == 2  # what is there is not fetched again


def test_a_joint_file_goes_before_files_of_tasks(tmp_path):
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(TRAIN))
    assert training_count(SUITE, ["boolq"], str(tmp_path), None) == 5
    assert training_count(SUITE, ["boolq"], str(tmp_path), 2) == 2
    assert training_count(SUITE, ["boolq"], HUB, None) == 170_300
    assert trained_on(SUITE, ["boolq"], str(tmp_path)) == trained_on(SUITE, ["boolq"], HUB) == list(SUITE.tasks)
    assert trained_on(SUITE, ["boolq"], str(tmp_path / "other")) == ["boolq"]


def test_without_hub_and_folder_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"commonsense_170k .*: no network; .*; or give --data FOLDER"):
        prepare_files(SUITE, ["boolq"], HUB, tmp_path, None, None)
    with pytest.raises(DataError, match=r"math_10k are under no known name on the hub: give --data FOLDER"):
        prepare_files(protocol_of("math-llama-7b").suite, ["gsm8k"], HUB, tmp_path, None, None)
    assert not list(tmp_path.iterdir())


def test_an_answer_that_is_no_option_is_told_by_its_place(tmp_path):
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(TRAIN))
    wrong = [
        {"instruction": "Q?\n\nAnswer format: true/false", "output": "the correct answer is maybe", "answer": "maybe"}
    ]
    (tmp_path / "boolq.test.json").write_text(json.dumps(wrong))
    with pytest.raises(
        DataError, match=r"boolq\.test\.json row 1: the answer 'maybe' is none of its options true, false"
    ):
        prepare_files(SUITE, ["boolq"], str(tmp_path), tmp_path / "out", None, None)


def test_answers_as_texts_list_no_options(tmp_path):
    lead = "Please choose the correct answer to the question: "
    rows = [
        {
            "instruction": f"{lead}What: is {n}?\n\nAnswer1: one Answer2: a two: {n}\n\nAnswer format: answer1/answer2",
            "output": "the correct answer is answer2",
            "answer": "answer2",
        }
        for n in range(121)
    ]
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(rows))
    (tmp_path / "ARC-Easy.test.json").write_text(json.dumps(rows[7:8]))
    yes = {"instruction": "Please answer with true or false, question: is it?\n\nAnswer format: true/false"}
    yes |= {"output": "the correct answer is true", "answer": "true"}
    (tmp_path / "boolq.test.json").write_text(json.dumps([yes]))
    prepare_files(SUITE, ["ARC-Easy", "boolq"], str(tmp_path), tmp_path / "out", None, None, "texts")
    made = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "ARC-Easy", "boolq"))
    (train,), (question,), (boolq,) = made
    assert train["prompt"].startswith("Question: What: is ")
    assert train["completion"] == f" a two: {train['prompt'].split()[3].rstrip('?')}"
    assert question == {
        "prompt": "Question: What: is 7?\nAnswer:", "completion": " a two: 7",
        "choices": [" one", " a two: 7"], "answer": 1,
    }  # fmt: skip
    assert boolq == {
        "prompt": "Question: is it?\nAnswer:", "completion": " true", "choices": [" true", " false"], "answer": 0,
    }  # fmt: skip


LISTED = "Which?\n\nAnswer1: {}\n\nAnswer format: answer1/answer2"


@pytest.mark.parametrize(("instruction", "message"), [
    (LISTED.format("one"), "Answer2: stands 0 times in its list of options"),
    (LISTED.format("one Answer2: two Answer2: three"), "Answer2: stands 2 times"),
    (LISTED.format("one Answer2: two").replace("\n\nA", " A"), "Answer1: begins no list of options"),
    (LISTED.format(" Answer2: two"), "its right option is empty"),
    (LISTED.format("one Answer2: two").removeprefix("Which?"), "its question is empty"),
    ("Which?", r"the answer 'answer1' is none of its options \(none\)"),
])  # fmt: skip
def test_rows_that_texts_cannot_be_read_from_are_named_by_their_place(tmp_path, instruction, message):
    row = {"instruction": instruction, "output": "x", "answer": "answer1"}
    (tmp_path / "commonsense_170k.json").write_text(json.dumps([row] * 121))
    with pytest.raises(DataError, match=rf"170k\.json row \d+: {message}"):
        prepare_files(SUITE, [], str(tmp_path), tmp_path / "out", None, None, "texts")


@pytest.mark.parametrize("wrong", ["one Answer2: one", "one Answer2:"])
def test_questions_whose_options_are_empty_or_alike_are_named_by_their_place(tmp_path, wrong):
    row = {"instruction": LISTED.format("one Answer2: two"), "output": "x", "answer": "answer1"}
    (tmp_path / "commonsense_170k.json").write_text(json.dumps([row] * 121))
    (tmp_path / "ARC-Easy.test.json").write_text(json.dumps([row, row | {"instruction": LISTED.format(wrong)}]))
    with pytest.raises(DataError, match=r"ARC-Easy\.test\.json row 2: an option is empty, or two are alike"):
        prepare_files(SUITE, ["ARC-Easy"], str(tmp_path), tmp_path / "out", None, None, "texts")


@pytest.mark.parametrize(("task", "answer", "wanted"), [
    ("SVAMP", "", "a number"), ("AQuA", "b", "a letter from A to E"), ("AQuA", "", "a letter from A to E"),
])  # fmt: skip
def test_a_question_without_an_answer_is_refused(tmp_path, task, answer, wanted):
    (tmp_path / "math_10k.json").write_text(json.dumps(TRAIN))
    row = {"instruction": "How many?", "input": "", "output": "Some.", "answer": answer}
    (tmp_path / f"{task}.test.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=f"give {wanted} in the column answer"):
        prepare_files(protocol_of("math-llama-7b").suite, [task], str(tmp_path), tmp_path / "out", None, None)


def test_too_few_rows_are_told_without_training(tmp_path):
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(TRAIN[:50]))
    with pytest.raises(DataError, match="has 50 training rows, of which 120 are held out"):
        training_count(SUITE, ["boolq"], str(tmp_path), None)
