"""Texts that the base writes to calibrate a kit."""

import json

import pytest
import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from siftune.base.errors import DataError
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.methods.keep.texts import sample_texts
from siftune.offsite.exchange import own_texts as module
from siftune.offsite.exchange.own_texts import Prompt, own_texts, prompts_of

PROMPTS = [Prompt([5, 6, 7], 5, [2]), Prompt([8], 2, [3]), Prompt([9, 10], 4, [])]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "own_texts"


def loss_by_loop(model, text):
    """Mean loss of the sampled tokens, one pass for each."""
    losses = []
    for place, label in enumerate(text["labels"]):
        if label != -100:
            with torch.no_grad():
                scores = model(torch.tensor([text["input_ids"][:place]])).logits[0, -1].double()
            losses.append(-scores.log_softmax(0)[label])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("count", "more", "prompts"), [(9, 3, ()), (7, 3, PROMPTS), (3, 1, PROMPTS[:1])])
def test_the_least_likely_are_left_out(count, more, prompts):
    model = tiny("llama")
    begins = [prompts[place % len(prompts)] for place in range(count + more)] if prompts else []
    lengths = [len(begin.ids) + begin.room for begin in begins] or 8
    texts = sample_texts(model, count + more, lengths, 3, [begin.ids for begin in begins])
    losses = [loss_by_loop(model, text) for text in texts]
    limit = sorted(losses)[count]
    likely = [place for place, loss in enumerate(losses) if loss < limit]
    found = own_texts(model, count, 8, 3, prompts)
    assert len(found) == count
    for place, text in zip(likely, found, strict=True):
        end = begins[place].end if begins and texts[place]["input_ids"][-1:] != begins[place].end else []
        assert text == {name: ids + end for name, ids in texts[place].items()}


def test_a_text_is_as_long_as_its_row_and_ends_like_it():
    model = tiny("llama", eos_token_id=None)  # never ends a text itself
    texts = own_texts(model, 3, 8, 0, PROMPTS)
    by_start = {tuple(text["input_ids"][: len(p.ids)]): text for text in texts for p in PROMPTS}
    for prompt in PROMPTS:
        if text := by_start.get(tuple(prompt.ids)):
            assert len(text["input_ids"]) == len(prompt.ids) + prompt.room + len(prompt.end)
            assert text["input_ids"][len(text["input_ids"]) - len(prompt.end) :] == prompt.end
            assert text["labels"] == [-100] * len(prompt.ids) + text["input_ids"][len(prompt.ids) :]


@pytest.mark.parametrize("eos", [[4], [7]])
def test_a_text_that_the_model_has_ended_has_one_end(monkeypatch, eos):
    text = {"input_ids": [8, 5, 4], "labels": [-100, 5, 4]}
    monkeypatch.setattr(module, "sample_texts", lambda *given: [{**text} for _ in range(2)])
    ended = {"input_ids": [8, 5, 4, 7], "labels": [-100, 5, 4, 7]}
    assert own_texts(tiny("llama"), 1, 8, 0, [Prompt([8], 2, eos)]) == [text if eos == [4] else ended]


def test_texts_are_sampled_once(cache, monkeypatch, caplog):
    model, calls = tiny("llama"), []
    monkeypatch.setattr(module, "sample_texts", lambda *given: calls.append(given) or sample_texts(*given))
    first = own_texts(model, 3, 6, 0, PROMPTS)
    assert own_texts(model, 3, 6, 0, PROMPTS) == first
    assert len(calls) == 1
    other = tiny("llama")
    other.lm_head.weight.data[0] += 1
    for given in ((model, 2, 6, 0, PROMPTS), (model, 3, 5, 0, PROMPTS), (model, 3, 6, 1, PROMPTS), (model, 3, 6, 0)):
        own_texts(*given)
    own_texts(other, 3, 6, 0, PROMPTS)
    own_texts(tiny("llama").double(), 3, 6, 0, PROMPTS)
    assert len(calls) == 7 == len([*cache.iterdir()])
    for path in cache.iterdir():
        path.write_text("[{")
    assert own_texts(model, 3, 6, 0, PROMPTS) == first
    assert "are damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(cache, caplog):
    cache.parent.write_text("")
    assert len(own_texts(tiny("llama"), 2, 5, 0)) == 2
    assert "are not cached" in caplog.text


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}#\n{% endif %}{% endfor %}"
    + ("{% if add_generation_prompt %}<assistant>{% endif %}")
)


@pytest.mark.parametrize("template", ["none", "chat"])
@pytest.mark.parametrize("length", [64, 28])
def test_prompts_and_answers_are_those_of_the_rows(template, length):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = rows_from([{"prompt": f"{n} and {n}?", "completion": str(10**n)} for n in range(1, 10)])
    tokens = tokenize_rows(rows, tokenizer, length, template)
    assert (max(tokens["length"]) == length) == (length == 28 and template == "chat")  # some are cut
    for row, prompt in zip(tokens, prompts_of(rows, tokenizer, length, template), strict=True):
        answer = [label for label in row["labels"] if label != -100]
        assert prompt.ids == row["input_ids"][: row["labels"].count(-100)]
        assert prompt.room + len(prompt.end) == len(answer)
        last = tokenizer.convert_tokens_to_ids("#") if template == "chat" else tokenizer.eos_token_id
        assert prompt.end == ([last] if answer[-1] == last else [])


def test_prompts_that_leave_no_token_are_left_out(caplog):
    rows = rows_from([{"prompt": "x" * n, "completion": "y"} for n in (9, 3, 8, 12)])
    every = prompts_of(rows, byte_tokenizer(), 64, "none")
    lengths = [len(prompt.ids) for prompt in every]
    assert len(set(lengths)) == 4
    assert not caplog.messages
    assert [prompt.ids for prompt in prompts_of(rows, byte_tokenizer(), lengths[0], "none")] == [
        every[1].ids, every[2].ids
    ]  # fmt: skip
    assert "2 of 4 prompts are left out" in caplog.text
    with pytest.raises(DataError, match=rf"row 2, takes {lengths[1]}: raise it to {lengths[1] + 1} or more"):
        prompts_of(rows, byte_tokenizer(), lengths[1], "none")


def test_a_prompt_without_tokens_is_refused():
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a b"}]
    rows = rows_from([{"messages": turns}])
    with pytest.raises(DataError, match="the prompt of row 1 has no token"):
        prompts_of(rows, byte_tokenizer(), 64, "none")


def test_rows_without_prompts_are_refused():
    rows = rows_from([{"text": "All of it."}])
    with pytest.raises(DataError, match="row 1 has no prompt, with which a text could begin; remove the row"):
        prompts_of(rows, byte_tokenizer(), 64)


def test_the_cache_is_json(cache):
    texts = own_texts(tiny("llama"), 2, 5, 0)
    (path,) = cache.iterdir()
    assert json.loads(path.read_text()) == texts
