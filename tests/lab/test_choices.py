"""Multiple choice beside lm-evaluation-harness: both score the same tokens, and the comparison adds up."""

import json
import sys
from types import ModuleType

import pytest
import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from lab import choices

TOLD = "Please choose the correct answer to the question: {}\n\n{}\n\nAnswer format: answer1/answer2"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def items(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("suite") / "ARC-Easy.test.json"
    options = ["Answer1: red Answer2: blue", "Answer1: a long one Answer2: no Answer3: maybe", "Answer1: x Answer2: y"]
    rows = [
        {"instruction": TOLD.format(f"Question {number}?", listed), "answer": "answer2"}
        for number, listed in enumerate(options)
    ]
    file.write_text(json.dumps(rows))
    return choices.questions(tokenizer, file, 2)


def test_the_first_questions_are_read_with_the_texts_of_their_options(items, tokenizer):
    texts = [[tokenizer.decode(option) for option in item.choices_ids] for item in items]
    assert texts == [[" red<|end|>", " blue<|end|>"], [" a long one<|end|>", " no<|end|>", " maybe<|end|>"]]
    assert [item.answer for item in items] == [1, 1]
    assert tokenizer.decode(items[1].prompt_ids) == "Question: Question 1?\nAnswer:"


def test_scores_are_the_options_log_likelihoods(items):
    model = tiny("llama", vocab_size=300).eval()
    found = choices.score("siftune", model, None, items, batch_size=2)
    for item, scores in zip(items, found, strict=True):
        for option, score in zip(item.choices_ids, scores, strict=True):
            ids = torch.tensor([[*item.prompt_ids, *option]])
            with torch.no_grad():
                log_p = model(ids).logits[0].double().log_softmax(-1)
            start = len(item.prompt_ids)
            wanted = sum(float(log_p[start + at - 1, token]) for at, token in enumerate(option))
            assert score == pytest.approx(wanted, abs=1e-3)


def test_the_harness_is_asked_for_the_same_tokens_and_its_answers_are_put_to_their_questions(items, monkeypatch):
    class Harness:
        def __init__(self, **given):
            assert given == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 4}

        def _loglikelihood_tokens(self, asked, disable_tqdm):
            asked = list(asked)
            wanted = [(list(item.prompt_ids), list(option)) for item in items for option in item.choices_ids]
            assert [tuple(one[1:]) for one in asked] == wanted
            return [(-float(number), False) for number in range(len(asked))]

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.models.huggingface"].HFLM = Harness
    assert choices.score("lm-eval", "model", "tokenizer", items, 4) == [[0.0, -1.0], [-2.0, -3.0, -4.0]]


def test_the_comparison_says_rates_their_ratio_and_how_far_scores_are_apart(capsys):
    def took(seconds, loglik):
        return {"seconds": seconds, "processor": 2 * seconds, "loglik": loglik}

    ours, theirs = [[-1.0, -2.0], [-3.0, -4.0]], [[-1.25, -2.0], [-3.5, -3.25]]
    rounds = [{"siftune": took(s, ours), "lm-eval": took(t, theirs)} for s, t in ((1.0, 2.0), (2.0, 6.0), (4.0, 4.0))]
    choices.compare(rounds)
    assert capsys.readouterr().out.splitlines() == [
        "questions a second (seconds): siftune 1.00, lm-eval 0.50; 2.00x (1.00 to 3.00)",
        "questions a second (processor): siftune 0.50, lm-eval 0.25; 2.00x (1.00 to 3.00)",
        "log-likelihoods differ by at most 0.750 nats; 50.0 % of the predictions are the same",
    ]
