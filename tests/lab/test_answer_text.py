"""Answers are found in texts as LLM-Adapters' evaluation finds them, in texts that are tricky."""

import json
from pathlib import Path

import pytest

from lab.reproduce.answer_text import begins_with, first_option, is_right, last_number

CASES = [json.loads(line) for line in (Path(__file__).parent / "tricky_answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:30] or "nothing")
def test_tricky_answers(case):
    assert is_right(case["text"], case["answer"], case["reader"], case.get("options", ())) is case["right"]


def test_nothing_is_found_in_nothing():
    assert first_option("", ["a"]) is None
    assert last_number("no number") is None
    assert last_number("3 of 1,000.5") == 1000.5


@pytest.mark.parametrize(("text", "right"), [
    (" Paris", True), ("Paris, France", True), ("the city is Paris", False), ("Parisian", False), ("paris", False),
    ("Frankfurt (Main)!", True), ("", False),
])  # fmt: skip
def test_a_text_begins_with_an_accepted_one(text, right):
    assert begins_with(text, [" Paris", "Frankfurt (Main)"]) is right
