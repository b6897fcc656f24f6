"""Tokenisation: chunks against single rows, and errors of bad rows."""

import pytest
from support.tokenizer import byte_tokenizer

from siftune.data import tokens
from siftune.data.encode import Encoder, labelled
from siftune.data.rows import rows_from
from siftune.data.tokens import Form, tokens_of

CHAT = byte_tokenizer()
TALK = {"messages": [{"role": role, "content": f"{role} says"} for role in ("user", "assistant") * 2]}
MIXED = [
    {"prompt": "1+1=", "completion": "2"},
    TALK,
    {"prompt": "x" * 90, "completion": "y"},  # leaves nothing to learn in 60 tokens
    {"prompt": "a", "completion": "z" * 99},  # is cut
    {"prompt": "2+2=", "completion": "4"},
]  # fmt: skip


def mixed(times=1):
    return [row for record in MIXED * times for row in rows_from([record], "data")]


def columns(found):
    return {name: found.data[name][:] for name in found.data.column_names}


@pytest.mark.parametrize("form", [Form(CHAT, 60), Form(CHAT, 60, completion_only=False), Form(CHAT, 500)])
def test_tokens_are_those_of_each_row_by_itself(form):
    rows = [row for row in mixed() if form.max_length > 60 or len(row.prompt[0].content) < 60]
    found = tokens_of(rows, form)
    for row, one in zip(rows, found.data, strict=True):
        ids, labels = labelled(Encoder(CHAT).encode([row])[0], form.completion_only)
        assert one["input_ids"] == ids[: form.max_length]
        assert one["labels"] == labels[: form.max_length]
        assert one["length"] == len(one["input_ids"])


def test_bad_rows_are_left_out_and_named_and_cut_ones_counted():
    rows = mixed()
    found = tokens_of(rows, Form(CHAT, 60))
    assert len(found.data) == 4
    assert [row.completion for row in found.usable(rows)] == ["2", "assistant says", "z" * 99, "4"]
    [fault] = found.faults(rows)
    assert str(fault).startswith("data 1: the prompt takes ")
    assert found.cut == 2  # the conversation has more than 60 tokens too


def test_a_row_that_the_template_or_the_tokenizer_refuses_takes_no_other_with_it():
    strict = byte_tokenizer("{% if 'no' in messages[0].content %}{{ raise_exception('not so') }}{% endif %}"
                            "{% for m in messages %}{{ m.content }}{% endfor %}")  # fmt: skip
    rows = rows_from([{"prompt": text, "completion": "b"} for text in ("yes", "no", "yes")], "row")
    found = tokens_of(rows, Form(strict, 60))
    assert [len(found.data), list(found.bad)] == [2, [1]]
    assert "row 2: the chat template refuses the conversation (not so)" in str(found.faults(rows)[0])


def test_a_row_that_is_rendered_again_is_noted_once(monkeypatch):
    """Where the tokenizer fails on one of many, each is tried by itself."""
    reopening = byte_tokenizer(
        "{% for m in messages %}{% if loop.last and m.role == 'user' %}>{% endif %}{{ m.content }}\n{% endfor %}"
    )
    original = Encoder._try

    def failing(self, texts, special):
        return ValueError("no") if any("fail" in text for text in texts) else original(self, texts, special)

    monkeypatch.setattr(Encoder, "_try", failing)
    rows = rows_from([{"prompt": text, "completion": "b"} for text in ("yes", "fail", "yes")])
    found = tokens_of(rows, Form(reopening, 60))
    assert list(found.bad) == [1]
    assert list(found.notes.values()) == [2]


def test_chunks_give_what_one_gives(monkeypatch):
    rows, told = mixed(5), []
    one = tokens_of(rows, Form(CHAT, 60), lambda *seen: told.append(seen))
    assert told == []  # few rows take no time
    monkeypatch.setattr(tokens, "_CHUNK", 4)
    monkeypatch.setattr(tokens, "_MANY", 25)
    many = tokens_of(rows, Form(CHAT, 60), lambda *seen: told.append(seen))
    assert columns(many) == columns(one)
    assert (many.bad, many.cut, many.notes) == (one.bad, one.cut, one.notes)
    assert list(many.bad) == [2, 7, 12, 17, 22]
    assert told == [("tokenising rows", done, 25) for done in (4, 8, 12, 16, 20, 24, 25)]
