import pytest
from support.tokenizer import byte_tokenizer

from siftune.base.errors import DataError, RecipeError
from siftune.data.encode import Encoder
from siftune.data.rows import rows_from
from siftune.evaluate.prepare import choose_metrics, prepare_rows

TOKENIZER = byte_tokenizer()
PLAIN = byte_tokenizer(chat_template=None)


def rows(*records):
    return rows_from(records, name="data.jsonl")


def question(**extra):
    return {"prompt": "2+2?", "completion": "4", **extra}


@pytest.mark.parametrize(
    ("records", "wanted"),
    [
        ([question()], {"exact_match", "perplexity"}),
        ([question(choices=["4", "5"])], {"choices", "perplexity"}),
        ([question(choices=["4", "5"]), question()], {"exact_match", "perplexity"}),
        ([question(completion="long " * 20)], {"perplexity"}),
        ([question(completion="long " * 20, answer="4")], {"exact_match", "perplexity"}),
        ([question(), question(completion="long " * 20)], {"perplexity"}),
        ([{"text": "short"}], {"perplexity"}),
    ],
)
def test_auto_goes_by_the_columns(records, wanted):
    assert choose_metrics(rows(*records), Encoder(TOKENIZER)) == wanted


def test_metrics_by_name():
    encoder = Encoder(TOKENIZER)
    assert choose_metrics(rows(question()), encoder, ("exact_match",)) == {"exact_match"}
    both = choose_metrics(rows(question(choices=["4", "5"])), encoder, ("auto", "exact_match"))
    assert both == {"choices", "exact_match", "perplexity"}
    with pytest.raises(RecipeError, match="unknown metric 'bleu'"):
        choose_metrics(rows(question()), encoder, ("bleu",))
    with pytest.raises(RecipeError, match="no metric"):
        choose_metrics(rows(question()), encoder, ())


@pytest.mark.parametrize("template", ["chat", "none"])
def test_perplexity_labels_are_the_completion_as_in_training(template):
    [(ids, labels)] = prepare_rows(rows(question()), TOKENIZER, ("perplexity",), template).sequences
    learned = [token for token in labels if token != -100]
    assert TOKENIZER.decode(learned) == "4<|end|>"
    assert ids[-len(learned) :] == learned
    start = "<|start|>user\n2+2?<|end|>\n<|start|>assistant\n" if template == "chat" else "2+2?"
    assert TOKENIZER.decode(ids[: -len(learned)]) == start


@pytest.mark.parametrize("answer", [1, "five", " Five. ", None, "missing"])
def test_choices_follow_the_prompt_and_end_like_completions(answer):
    extra = {"choices": ["four", "five"]} | ({} if answer == "missing" else {"answer": answer})
    [item] = prepare_rows(rows({"prompt": "2+3?", "completion": "five", **extra}), PLAIN).items
    assert PLAIN.decode(item.prompt_ids) == "2+3?"
    assert [PLAIN.decode(ids) for ids in item.choices_ids] == ["four<|end|>", "five<|end|>"]
    assert item.answer == 1


@pytest.mark.parametrize("choices", [None, "4", [], ["4"], ["4", "4"], ["4", ""], ["4", 5]])
def test_choices_that_are_none(choices):
    with pytest.raises(DataError, match=r"data.jsonl 2: 'choices' is"):
        prepare_rows(rows(question(choices=["4", "5"]), question(choices=choices)), TOKENIZER, ("choices",))


@pytest.mark.parametrize("answer", [2, -1, True, 1.0, "six", ["4"]])
def test_answers_that_are_no_choice(answer):
    with pytest.raises(DataError, match=r"data.jsonl 1: .*none of the 2 choices"):
        prepare_rows(rows(question(choices=["4", "5"], answer=answer)), TOKENIZER)


def test_an_answer_that_fits_two_choices():
    with pytest.raises(DataError, match="none of the 2 choices"):
        prepare_rows(rows(question(choices=["A", "a."], answer=" a")), TOKENIZER)


@pytest.mark.parametrize(
    ("extra", "accepted"),
    [
        ({}, ("4",)),
        ({"answer": "four"}, ("4", "four")),
        ({"answer": 4}, ("4",)),
        ({"answer": 1, "choices": ["5", "four"]}, ("4", "four")),
    ],
)
def test_texts_that_count_as_right(extra, accepted):
    prepared = prepare_rows(rows(question(**extra)), TOKENIZER, ("exact_match",))
    assert prepared.questions.accepted == [accepted]


def test_questions_leave_room_for_the_longest_right_text():
    asked = rows(question(), question(answer="four and no more"))
    questions = prepare_rows(asked, TOKENIZER, ("exact_match",)).questions
    assert questions.max_new_tokens == len("four and no more") + 1 + 4  # its end and some slack
    assert prepare_rows(asked, TOKENIZER, ("exact_match",), max_new_tokens=3).questions.max_new_tokens == 3
    assert TOKENIZER.decode(questions.prompts_ids[0]).endswith("<|start|>assistant\n")


def test_the_template_s_own_end_of_turn_ends_a_text():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|bos|>"  # another than the template's <|end|>
    assert prepare_rows(rows(question()), tokenizer, ("exact_match",)).questions.eos_ids == (1, 3)
    assert prepare_rows(rows(question()), PLAIN, ("exact_match",)).questions.eos_ids == (3,)


@pytest.mark.parametrize("metric", ["choices", "exact_match"])
def test_plain_text_has_no_prompt(metric):
    with pytest.raises(DataError, match=r"data.jsonl 1: the row has no prompt"):
        prepare_rows(rows({"text": "a", "choices": ["a", "b"]}), TOKENIZER, (metric,))
