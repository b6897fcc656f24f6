from __future__ import annotations

import pytest
from support.tokenizer import byte_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from siftune.base.errors import DataError, ModelError, RecipeError
from siftune.data.encode import Encoder
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows

CHAT = byte_tokenizer()
PLAIN = byte_tokenizer(chat_template=None)
END = CHAT.eos_token_id
SUM = {"prompt": "1+1=", "completion": "2"}
TALK = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello "},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    ]
}
# as reasoning models do: only the last answer keeps its thoughts
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# the last question is marked only as long as it is open
REOPENING = (
    "{% for m in messages %}{% if loop.last and m.role == 'user' %}>{% endif %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
UNMARKED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"  # noqa: E501 fmt: skip
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user must start') }}{% endif %}" + UNMARKED


def tokenized(record, tokenizer=CHAT, max_length=200, **options):
    (row,) = tokenize_rows(rows_from([record]), tokenizer, max_length, **options)
    assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    return row


def text(row, tokenizer=CHAT) -> str:
    return tokenizer.decode(row["input_ids"])


def learned(row, tokenizer=CHAT) -> list[str]:
    """The runs of label tokens, as text."""
    runs = [[]]
    for label in row["labels"]:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


# what is learned


def test_chat_template_learns_the_answer_and_its_end_but_no_white_space():
    row = tokenized(SUM)
    assert text(row) == "<|start|>user\n1+1=<|end|>\n<|start|>assistant\n2<|end|>"
    assert learned(row) == ["2<|end|>"]
    assert row["labels"][-2:] == [*CHAT("2")["input_ids"], END]


def test_without_a_template_prompt_and_completion_join_as_given():
    for row in (tokenized(SUM, template="none"), tokenized(SUM, PLAIN)):
        assert text(row) == "1+1=2<|end|>"
        assert learned(row) == ["2<|end|>"]


def test_a_bos_comes_first_exactly_if_the_tokenizer_adds_one():
    tokenizer = byte_tokenizer(None, add_bos=True)
    row = tokenized(SUM, tokenizer)
    assert text(row, tokenizer) == "<|bos|>1+1=2<|end|>"
    assert learned(row, tokenizer) == ["2<|end|>"]
    row = tokenized(SUM, byte_tokenizer(add_bos=True))
    assert text(row).startswith("<|start|>user")  # a chat template writes its own


def test_all_plain_text_has_labels_and_no_template():
    row = tokenized({"text": "Once upon"})
    assert text(row) == "Once upon<|end|>"
    assert row["labels"] == row["input_ids"]


def test_prompts_have_labels_on_request():
    row = tokenized(SUM, completion_only=False)
    assert row["labels"] == row["input_ids"]


def test_the_seam_is_never_merged():
    tokenizer = byte_tokenizer(None, merges=(("=", "2"),))
    joint = tokenizer("1+1=2")["input_ids"]
    row = tokenized(SUM, tokenizer)
    assert len(joint) == 4
    assert row["input_ids"] == tokenizer("1+1=")["input_ids"] + tokenizer("2")["input_ids"] + [END]


LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def spacing_tokenizer(template):
    """A tokenizer that puts a space before every text, as that of Llama 2 does, and joins spaces with letters."""
    letters = [chr(number) for number in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", "▁", "\n", *letters, *(f"▁{letter}" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(BPE(vocabulary, merges=[("▁", letter) for letter in letters], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template)


def test_no_space_comes_between_prompt_and_completion_if_the_tokenizer_puts_one_before_a_text():
    tokenizer = spacing_tokenizer(None)
    (row,) = rows_from([SUM])
    assert tokenized(SUM, tokenizer)["input_ids"] == tokenizer("1+1=2</s>")["input_ids"]
    assert Encoder(tokenizer).completion(row, "7") == tokenizer.convert_tokens_to_ids(["7", "</s>"])


@pytest.mark.parametrize("template", [LLAMA2, ZEPHYR])
def test_the_parts_of_a_conversation_have_the_tokens_of_the_whole_if_the_tokenizer_puts_a_space_before_a_text(template):
    tokenizer = spacing_tokenizer(template)
    whole = tokenizer.apply_chat_template(TALK["messages"], tokenize=False).rstrip()
    assert tokenized(TALK, tokenizer)["input_ids"] == tokenizer(whole)["input_ids"]


# several turns


def test_every_turn_of_the_assistant_is_learned_with_its_end():
    row = tokenized(TALK)
    expected = CHAT.apply_chat_template(TALK["messages"], tokenize=False)
    assert text(row) == expected.rstrip()
    assert learned(row) == ["Hello <|end|>", "Ciao<|end|>"]


def test_an_opening_turn_of_the_assistant_has_no_labels():
    row = tokenized({"messages": TALK["messages"][1:]})
    assert learned(row) == ["Ciao<|end|>"]


def test_a_template_that_rewrites_earlier_turns_learns_the_last_one_and_warns_once(caplog):
    tokenizer = byte_tokenizer(FORGETFUL)
    rows = tokenize_rows(rows_from([TALK, TALK]) + rows_from([SUM]), tokenizer, 200)
    assert [learned(row) for row in rows] == [["<think></think>Ciao<|end|>"]] * 2 + [["<think></think>2<|end|>"]]
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 3 rows: the chat template rewrites earlier turns; only the last turn has labels"
    ]


def test_a_template_that_reopens_the_prompt_gets_the_completion_after_the_generation_prompt(caplog):
    row = tokenized(SUM, byte_tokenizer(REOPENING))
    assert text(row) == ">1+1=\nA:2<|end|>"
    assert learned(row) == ["2<|end|>"]
    assert "1 of 1 rows: the chat template changes the prompt" in caplog.text


@pytest.mark.parametrize("answer", ["2", ":", "yes\n"])
def test_a_template_without_an_end_gets_one(answer):
    row = tokenized({"prompt": "Q", "completion": answer}, byte_tokenizer(UNMARKED))
    assert learned(row) == [f" {answer.strip()}<|end|>"]


@pytest.mark.parametrize("answer", [">", "|>", "end|>"])
def test_a_template_with_an_end_gets_no_second_one(answer):
    assert learned(tokenized({"prompt": "Q", "completion": answer})) == [f"{answer}<|end|>"]


# limits


def test_long_completions_are_cut_and_counted_once(caplog):
    rows = rows_from([{"prompt": "ab", "completion": "c" * n} for n in (3, 7, 8, 9)])
    data = tokenize_rows(rows, PLAIN, 10)
    assert data["length"] == [6, 10, 10, 10]
    assert learned(data[0]) == ["ccc<|end|>"]
    assert learned(data[1]) == ["ccccccc<|end|>"]
    assert learned(data[3]) == ["cccccccc"]
    assert [r.getMessage() for r in caplog.records] == ["2 of 4 rows are cut at --max-length 10 tokens"]


@pytest.mark.parametrize("limit", [3, 4])
def test_a_prompt_that_leaves_nothing_to_learn_is_refused(limit):
    rows = rows_from([{"prompt": "a", "completion": "b"}, SUM], "sums.jsonl row")
    with pytest.raises(DataError) as caught:
        tokenize_rows(rows, PLAIN, limit)
    assert str(caught.value).startswith(f"sums.jsonl row 2: the prompt takes 4 of 6 tokens, but the limit is {limit}")
    assert "--max-length to 6" in str(caught.value)
    assert learned(tokenized(SUM, PLAIN, 5)) == ["2"]


def test_a_cut_that_leaves_an_earlier_turn_is_kept():
    full = tokenized(TALK)
    first = full["labels"].index(CHAT("H")["input_ids"][0])
    assert learned(tokenized(TALK, max_length=first + 2)) == ["He"]
    with pytest.raises(DataError, match=f"takes {first} of"):
        tokenized(TALK, max_length=first)


def test_a_first_token_alone_teaches_nothing():
    with pytest.raises(DataError, match=r"row 1: .*the limit is 1,"):
        tokenized({"text": "Once"}, max_length=1)
    assert learned(tokenized({"text": "Once"}, max_length=2)) == ["On"]


# evaluation agrees with training


@pytest.mark.parametrize("template", [CHAT.chat_template, FORGETFUL, REOPENING, UNMARKED, None])
@pytest.mark.parametrize("record", [SUM, TALK, {"text": "Once"}])
def test_prompt_and_completion_of_evaluation_are_those_of_training(template, record):
    tokenizer = byte_tokenizer(template, add_bos=True)
    (row,) = rows_from([record])
    if template is None and record is TALK:
        with pytest.raises(DataError, match=r"row 1: a conversation .*user, assistant, user\)"):
            Encoder(tokenizer).prompt(row)
        return
    prompt, completion = Encoder(tokenizer).prompt(row), Encoder(tokenizer).completion(row)
    trained = tokenized(record, tokenizer)
    assert prompt + completion == trained["input_ids"]
    assert trained["labels"][len(prompt) :] == completion


def test_another_completion_in_place_of_the_rows_own():
    (row,) = rows_from([SUM])
    for template in ("chat", "none"):
        assert CHAT.decode(Encoder(CHAT, template).completion(row, "17")) == "17<|end|>"


def test_a_template_from_a_file(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=None)
    encoder = Encoder(tokenizer, path)
    (row,) = rows_from([{"prompt": "Hi", "completion": "Hello"}])
    assert tokenizer.decode(encoder.prompt(row)).endswith("[user]Hi[assistant]")
    assert tokenizer.chat_template == path.read_text()
    path.write_text("\ufeff" + CHAT.chat_template, encoding="utf-8")  # as some editors for Windows do
    assert tokenizer.decode(Encoder(tokenizer, path).prompt(row)).startswith("<|start|>user")


# refusals


def test_an_empty_template_is_refused(tmp_path):
    """It would count as none."""
    (tmp_path / "t.jinja").write_text(" \n")
    with pytest.raises(RecipeError, match=r"t.jinja is empty"):
        Encoder(byte_tokenizer(), tmp_path / "t.jinja")


def test_templates_are_checked():
    with pytest.raises(RecipeError, match="template alpaca cannot be read"):
        Encoder(CHAT, "alpaca")
    with pytest.raises(RecipeError, match=r"no chat template; use template 'none'"):
        Encoder(PLAIN, "chat")


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        Encoder(tokenizer)


def test_a_conversation_that_the_template_refuses_names_the_row():
    record = {"messages": [{"role": "system", "content": "x"}, *TALK["messages"]]}
    with pytest.raises(DataError, match=r"row 1: .*the user must start.*system, user"):
        tokenized(record, byte_tokenizer(STRICT))


def test_a_row_of_which_the_template_leaves_out_a_turn_is_refused():
    for_two = "{% for m in messages if m.role != 'bing' %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
    tokenizer = byte_tokenizer(for_two + "{% if add_generation_prompt %}[assistant]{% endif %}")
    turns = [{"role": "bing", "content": "By the way"}, *TALK["messages"]]
    with pytest.raises(DataError, match=r"^row 1: .* 'bing'"):
        tokenized({"messages": turns}, tokenizer)
    assert len(learned(tokenized(TALK, tokenizer))) == 2


# a tokenizer that fails


def panicking(pattern=r"^(\w+ ?)*$"):
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), tokenizer.backend_tokenizer.pre_tokenizer]
    )
    return tokenizer


ENDLESS = {"prompt": "Q", "completion": "a" * 60 + "!"}


def test_a_panic_of_the_tokenizer_is_a_sentence_that_names_the_row():
    with pytest.raises(DataError, match=r"^row 2: the tokenizer fails.*\(.*retry-limit.*\)"):
        tokenize_rows(rows_from([SUM, ENDLESS, SUM]), panicking(), 100)
    row = rows_from([ENDLESS])[0]
    with pytest.raises(DataError, match=r"^row 1: the tokenizer fails") as caught:
        Encoder(panicking()).completion(row)
    assert type(caught.value.__cause__).__name__ == "PanicException"
    with pytest.raises(DataError, match=r"^row 1: the tokenizer fails"):
        Encoder(panicking()).prompt(row)
    assert (
        tokenize_rows(rows_from([SUM]), panicking(), 100)["input_ids"]
        == tokenize_rows(rows_from([SUM]), PLAIN, 100)["input_ids"]
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_passed_on(stop):
    class Stopping(type(PLAIN)):
        def __call__(self, texts, **options):
            if texts != ["a"]:
                raise stop
            return super().__call__(texts, **options)

    tokenizer = Stopping(tokenizer_object=PLAIN.backend_tokenizer, eos_token="<|end|>")
    with pytest.raises(stop):
        tokenize_rows(rows_from([SUM]), tokenizer, 100)
