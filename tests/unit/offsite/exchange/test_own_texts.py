"""Texts that the base writes to calibrate a kit."""

import json
import os

import pytest
import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from siftune.base.errors import DataError
from siftune.data.rows import rows_from
from siftune.data.sampled_texts import sample_texts
from siftune.data.tokens import tokenize_rows
from siftune.offsite.exchange import own_texts as module
from siftune.offsite.exchange.own_texts import own_texts, prompt_ids, usual_length

PROMPTS = [[5, 6, 7], [8], [9, 10]]


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
    begins = [prompts[place % len(prompts)] for place in range(count + more)] if prompts else ()
    texts = sample_texts(model, count + more, 8, 3, begins)
    assert all(text["input_ids"][: len(begin)] == begin for text, begin in zip(texts, begins, strict=False))
    losses = [loss_by_loop(model, text) for text in texts]
    limit = sorted(losses)[count]
    assert own_texts(model, count, 8, 3, prompts) == [
        text for text, loss in zip(texts, losses, strict=True) if loss < limit
    ]


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
    assert not caplog.messages


def changed_texts(content):
    """Other texts of the right form, as an attacker would leave them there."""
    cached = json.loads(content)
    cached["texts"][0]["input_ids"][-1] += 1
    return json.dumps(cached).encode()


@pytest.mark.parametrize(
    "damage",
    [
        changed_texts,
        lambda content: b"[{",
        lambda content: b"\xff" + content,
        lambda content: b"[" * 100_000,
        lambda content: content.replace(b"input_ids", b"input_idx"),
        lambda content: json.dumps(json.loads(content)["texts"]).encode(),
    ],
    ids=["texts", "half", "encoding", "nesting", "name", "form"],
)
def test_damaged_texts_are_written_again(cache, caplog, damage):
    model = tiny("llama")
    first = own_texts(model, 3, 6, 0, PROMPTS)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert own_texts(model, 3, 6, 0, PROMPTS) == first
    assert "the model writes its texts again" in caplog.text
    assert path.read_bytes() == content


def test_texts_under_the_name_of_others_are_written_again(cache, caplog):
    model = tiny("llama")
    own_texts(model, 3, 6, 0)
    (other,) = cache.iterdir()
    expected = own_texts(model, 3, 6, 1)
    (path,) = {*cache.iterdir()} - {other}
    path.write_bytes(other.read_bytes())
    assert own_texts(model, 3, 6, 1) == expected
    assert "is damaged" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_texts_that_others_may_have_written_are_not_used(cache, caplog):
    model = tiny("llama")
    first = own_texts(model, 3, 6, 0)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    assert own_texts(model, 3, 6, 0) == first
    assert "other users of this machine may write" in caplog.text
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_no_error(cache, caplog):
    cache.parent.write_text("")
    assert len(own_texts(tiny("llama"), 2, 5, 0)) == 2
    assert "are not cached" in caplog.text


@pytest.mark.parametrize("template", ["none", "chat"])
def test_a_prompt_ends_where_the_labels_begin(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = rows_from([{"prompt": f"{n} and {n}?", "completion": str(2 * n)} for n in range(3)])
    expected = [row["input_ids"][: row["labels"].count(-100)] for row in tokenize_rows(rows, tokenizer, 64, template)]
    assert prompt_ids(rows, tokenizer, 64, template) == expected


def test_prompts_that_leave_too_little_are_left_out(caplog):
    rows = rows_from([{"prompt": "x" * n, "completion": "y"} for n in (9, 3, 8, 12)])
    every = prompt_ids(rows, byte_tokenizer(), 64, "none")
    lengths = [len(ids) for ids in every]
    assert len(set(lengths)) == 4
    assert not caplog.messages
    assert prompt_ids(rows, byte_tokenizer(), lengths[2] + 4, "none") == every[1:3]
    assert "2 of 4 prompts are left out" in caplog.text
    assert prompt_ids(rows, byte_tokenizer(), lengths[1] + 4, "none") == every[1:2]
    with pytest.raises(DataError, match=rf"row 2, takes {lengths[1]}: raise it to {lengths[1] + 4} or more"):
        prompt_ids(rows, byte_tokenizer(), lengths[1] + 3, "none")


def test_a_prompt_without_tokens_is_refused():
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a b"}]
    rows = rows_from([{"messages": turns}])
    with pytest.raises(DataError, match="the prompt of row 1 has no token"):
        prompt_ids(rows, byte_tokenizer(), 64, "none")


@pytest.mark.parametrize(
    ("prompts", "answers", "most", "expected"),
    [
        ((4, 6, 8, 9), (6, 5, 4, 9), 64, 13),  # lengths with the end token 11, 12, 13 and 19
        ((4, 6, 8, 9), (6, 5, 4, 9), 11, 11),
        ((5, 5, 5), (1, 1, 1), 64, 9),  # two tokens of an answer, but four are sampled
        ((7,), (9,), 64, 17),
    ],
)
def test_three_quarters_of_the_rows_are_as_long_at_most(prompts, answers, most, expected, caplog):
    rows = rows_from([{"prompt": "x" * n, "completion": "y" * m} for n, m in zip(prompts, answers, strict=True)])
    assert usual_length(rows, byte_tokenizer(), most, "none") == expected
    assert usual_length(rows, byte_tokenizer(), most, "chat") == most
    assert not caplog.messages  # such as on rows that are cut


def test_rows_without_prompts_are_refused():
    rows = rows_from([{"text": "All of it."}])
    with pytest.raises(DataError, match="row 1 has no prompt"):
        usual_length(rows, byte_tokenizer(), 64, "none")
    with pytest.raises(DataError, match="row 1"):
        prompt_ids(rows, byte_tokenizer(), 64)
