"""Rows of the hub become the questions of LLM-Adapters' files, word for word as far as these are known here."""

import pytest

from lab.reproduce.tasks import TASKS, options_of

HUB = {
    "boolq": ({"question": "is it so", "answer": True}, "question: is it so?", "true/false", "true"),
    "piqa": (
        {"goal": "Fix it.", "sol1": "Glue.", "sol2": "Tape.", "label": 1},
        "question: Fix it.\n\nSolution1: Glue.\n\nSolution2: Tape.", "solution1/solution2", "solution2",
    ),
    "social_i_qa": (
        {"context": "He ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "He ran. Why?\n\nAnswer1: a Answer2: b Answer3: c", "answer1/answer2/answer3", "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Sport", "ctx": "He", "endings": ["a", "b", "c", "d"], "label": "0"},
        "Sport: He\n\nEnding1: a Ending2: b Ending3: c Ending4: d", "ending1/ending2/ending3/ending4", "ending1",
    ),
    "winogrande": (
        {"sentence": "_ ran.", "option1": "Al", "option2": "Bo", "answer": "2"},
        "_ ran.\n\nOption1: Al Option2: Bo", "option1/option2", "option2",
    ),
    "ARC-Easy": (
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "Q?\n\nAnswer1: x Answer2: y", "answer1/answer2", "answer2",
    ),
    "ARC-Challenge": (
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
        "Q?\n\nAnswer1: x Answer2: y", "answer1/answer2", "answer1",
    ),
    "openbookqa": (
        {"question_stem": "S", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        "S\n\nAnswer1: x Answer2: y", "answer1/answer2", "answer1",
    ),
    "gsm8k": ({"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, "How many?", None, "1,004"),
    "AQuA": (
        {"question": "Sum?", "options": ["A)1", "B)2"], "rationale": "one", "correct": "A"},
        "Sum? Answer Choices: A)1 B)2", None, "A",
    ),
    "mawps": ({"question": "How many?", "result": "4"}, "How many?", None, "4"),
    "SVAMP": ({"Body": "He has 4.", "Question": "How many?", "Answer": 4.0}, "He has 4. How many?", None, "4.0"),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_the_hub_becomes_a_question(task):
    row, ends, form, answer = HUB[task]
    question = TASKS[task].question(row)
    assert question["instruction"].endswith(ends if form is None else f"{ends}\n\nAnswer format: {form}")
    assert question["answer"] == answer
    options = options_of(question["instruction"])
    assert (answer in options) == (TASKS[task].reader == "option") == bool(options)
    if options:
        assert question["output"] == f"the correct answer is {answer}"
