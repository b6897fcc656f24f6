"""Each number of a token has an embedding, wherever it stands; and there are not too many of anything."""

import json

import pytest
from support.tokenizer import byte_tokenizer

from siftune.base.errors import KitError
from siftune.offsite.kit import tokenizer_tokens
from siftune.offsite.kit.tokenizer import make_tokenizer, tokenizer_files
from siftune.offsite.kit.tokenizer_tokens import check_tokens

SIZE = 260  # tokens of the tokenizer of bytes


def files_with(change=lambda whole: None, add_bos=True):
    files = tokenizer_files(byte_tokenizer(add_bos=add_bos))
    whole = json.loads(files["tokenizer.json"])
    change(whole)
    return files | {"tokenizer.json": json.dumps(whole).encode()}


def refused(change, words, vocabulary=SIZE):
    with pytest.raises(KitError, match=words) as caught:
        make_tokenizer(files_with(change), vocabulary)
    assert str(caught.value).startswith("tokenizer.json: ")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """What is refused here is refused without asking a child."""
    monkeypatch.setattr("siftune.offsite.kit.tokenizer.try_out", lambda files: None)


def test_exactly_as_many_embeddings_as_tokens_will_do():
    assert len(make_tokenizer(files_with(), SIZE)) == SIZE
    with pytest.raises(KitError, match=r"model.vocab has 260 tokens, but there are 259 embeddings"):
        make_tokenizer(files_with(), SIZE - 1)


def in_vocabulary(whole):
    whole["model"]["vocab"]["a"] = SIZE


def added(**fields):
    token = {"id": SIZE, "content": "<new>", "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return lambda whole: whole["added_tokens"].append(token | fields)


def posts(**fields):
    return lambda whole: whole["post_processor"].update(fields)


def special(**fields):
    return lambda whole: whole["post_processor"]["special_tokens"]["<|bos|>"].update(fields)


def ends(number):
    part = {"type": "RobertaProcessing", "sep": ["<|end|>", number], "cls": ["<|bos|>", 1]}
    return lambda whole: whole.update(post_processor={"type": "Sequence", "processors": [part]})


def model(**fields):
    return lambda whole: whole.update(model=fields)


A, TWO = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
BOS = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_vocabulary, "model.vocab: 'a' is 260, which is not the number of one of the 260 embeddings"),
        (lambda whole: whole["model"]["vocab"].update(a=-1), "'a' is -1"),
        (lambda whole: whole["model"]["vocab"].update(a=True), "'a' is True"),
        (lambda whole: whole["model"]["vocab"].update(a=1.0), "'a' is 1.0"),
        (added(), "added_tokens.4.id is 260, which is not the number of one of the 260 embeddings"),
        (added(id=2**40), "added_tokens.4.id is 1099511627776"),
        (special(ids=[260]), r"special_tokens.'<\|bos\|>'.ids is 260, which is not"),
        (special(ids=[0] * 17), "ids has 17 items"),
        (special(tokens=["a"] * 17), "tokens has 17 items"),
        (ends(260), "processors.0.sep is 260"),
        (ends("1"), "processors.0.sep is '1'"),
        (posts(single=[A, A]), "single has a text twice"),
        (posts(pair=[A, BOS, TWO, TWO]), "pair has a text twice"),
        (posts(single=[BOS] * 10_000), "single has 10000 items"),
        (posts(type="Evil"), "post_processor is 'Evil'; a kit may have ByteLevel, RobertaProcessing"),
        (posts(special_tokens={str(i): {} for i in range(17)}), "special_tokens has 17 entries"),
        (lambda whole: whole["model"]["vocab"].update({"x" * 1025: 0}) or whole["model"]["vocab"].pop("b"), "1025"),
        (added(id=5, content="x" * 1025), "content has 1025 characters"),
        (added(id=5, content=""), "content has 0 characters"),
        (lambda whole: whole.update(added_tokens=whole["added_tokens"] * 20_000), "added_tokens has 80000 items"),
        (lambda whole: whole["model"].update(dropout=0.5), "draws by chance is not allowed"),
        (lambda whole: whole["model"].update(merges=[["a", "b", "c"]]), "merges.0 is .*, not two tokens"),
        (lambda whole: whole["model"].update(end_of_word_suffix="x" * 17), "end_of_word_suffix has 17"),
        (model(type="Unigram", vocab=[["a", 0.0]] * 261, unk_id=0), "vocab has 261 tokens, but"),
        (model(type="Unigram", vocab=[["a", "b"]], unk_id=0), "vocab.0 is .*, not a token and its score"),
        (model(type="Unigram", vocab=[["a", 0.0]], unk_id=260), "unk_id is 260, which is not"),
        (model(type="WordPiece", vocab={"a": 0}, unk_token="a"), "model is 'WordPiece'; a kit may have BPE"),
        (model(type="BPE", merges=[]), "model has no vocab"),
        (lambda whole: whole.update(model=None), "model is None"),
        (lambda whole: whole.update(added_tokens={}), "added_tokens is {}"),
    ],
)
def test_a_number_past_the_embeddings_or_too_much_of_something_is_refused(change, words):
    refused(change, words)


def test_ten_thousand_times_ten_thousand_numbers_are_refused():
    def change(whole):
        whole["post_processor"]["special_tokens"]["<|bos|>"].update(ids=[1] * 10_000, tokens=["a"] * 10_000)
        whole["post_processor"]["single"] = [BOS] * 10_000

    refused(change, "has 10000 items; it must be a list of at most 16")


def test_two_million_tokens_are_refused():
    whole = json.loads(files_with()["tokenizer.json"])
    whole["model"]["vocab"] = {f"{number:x}": number for number in range(2_000_000)}
    with pytest.raises(KitError, match=r"vocab has 2000000 tokens, but there are 49152 embeddings"):
        check_tokens(whole, 49152)


def test_merges_are_counted(monkeypatch):
    monkeypatch.setattr(tokenizer_tokens, "MAX_MERGES", 3)
    refused(lambda whole: whole["model"].update(merges=["a b"] * 4), "merges has 4 items")


def test_numbers_that_the_library_gives_of_itself_are_seen():
    """An added token whose number is another's gets the next one that is free, which the file does not say."""
    with pytest.raises(KitError, match="'<new>' is token 260 of 260 embeddings"):
        make_tokenizer(files_with(added(id=5)), SIZE)
    assert make_tokenizer(files_with(added(id=5)), SIZE + 1).convert_tokens_to_ids("<new>") == SIZE
