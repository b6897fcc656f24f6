"""What is kept of answers, and how questions are asked of a tiny model."""

import numpy as np
import pytest
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from lab.reproduce.answers import Answers, Asking, Scores, ask
from lab.reproduce.harness import HARNESS
from lab.reproduce.tasks import TASKS
from siftune.base.errors import RecipeError
from siftune.data.rows import rows_from
from siftune.evaluate import measure as measuring
from siftune.evaluate.measure import measure
from siftune.evaluate.prepare import prepare_rows

QUESTIONS = [
    {"prompt": f"{n}?", "completion": " a1", "choices": [" a1", " a22", " a333"], "answer": 0} for n in range(4)
]


@pytest.fixture
def model():
    return tiny("llama", layers=2, vocab_size=300)


def asking(*metrics, ends=True):
    return Asking(metrics, template="none", max_new_tokens=4, batch_size=2, ends=ends)


def test_what_is_there_is_not_asked_again_and_what_is_missing_is_added(model, tmp_path):
    answers, task, tokenizer = Answers(tmp_path / "boolq.json"), TASKS["boolq"], byte_tokenizer(chat_template=None)
    rows = rows_from(QUESTIONS)
    ask(model, tokenizer, rows, task, answers, asking("likeliest"))
    expected = measure(model, prepare_rows(rows, tokenizer, ("choices", "perplexity"), "none"), 2)
    assert answers.scores("likeliest").values == expected["choices"].values.tolist()
    assert answers.scores("nats") is None
    answers.add({"likeliest": Scores([9.0], [1.0])}, ())
    assert asking("likeliest", "nats", "generated").missing(answers, task) == ["nats", "generated"]
    ask(model, tokenizer, rows, task, answers, asking("likeliest", "nats", "generated"))
    assert answers.scores("likeliest").values == [9.0]
    nats = answers.scores("nats")
    np.testing.assert_allclose(nats.values, expected["perplexity"].values)
    assert nats.weights == [4.0] * 4  # the text's three bytes, and its end
    assert answers.scores("generated").values == [0.0] * 4
    answers.path.write_text("[1]")
    with pytest.raises(RecipeError, match=r"boolq\.json is damaged: remove it"):
        answers.scores("nats")


def test_options_are_compared_without_the_end_where_the_suite_asks_so(model, tmp_path, monkeypatch):
    tokenizer, rows = byte_tokenizer(chat_template=None), rows_from(QUESTIONS)
    scored, compared = measuring.score_choices, []

    def note(model, items, batch_size):
        compared.append([list(ids) for item in items for ids in item.choices_ids])
        return scored(model, items, batch_size)

    monkeypatch.setattr(measuring, "score_choices", note)
    for ends in (True, False):
        ask(model, tokenizer, rows, HARNESS["sciq"], Answers(tmp_path / f"{ends}.json"), asking("likeliest", ends=ends))
    with_end, without = compared
    assert with_end == [[*ids, tokenizer.eos_token_id] for ids in without]
    assert len(without) == 12


def test_a_task_of_texts_is_right_where_the_model_writes_one(model, tmp_path):
    tokenizer, task = byte_tokenizer(chat_template=None), HARNESS["web_questions"]
    rows = [{"prompt": "where?", "completion": " x", "accepted": ["x"]}]
    first = Answers(tmp_path / "first.json")
    ask(model, tokenizer, rows_from(rows), task, first, asking("likeliest"))
    (written,) = first._kept()["texts"]
    assert first.scores("likeliest").values == [0.0]
    second = Answers(tmp_path / "second.json")
    rows[0]["accepted"] = ["x", written]
    ask(model, tokenizer, rows_from(rows), task, second, asking("likeliest"))
    assert second.scores("likeliest").values == [1.0]
    assert asking("generated", "likeliest").missing(Answers(tmp_path / "none.json"), TASKS["gsm8k"]) == ["generated"]
