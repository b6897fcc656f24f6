import json

import pytest
from support.tokenizer import CHATML, byte_tokenizer
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from siftune.base.errors import KitError
from siftune.offsite.kit import tokenizer as kit_tokenizer
from siftune.offsite.kit.manifest import canonical
from siftune.offsite.kit.tokenizer import make_tokenizer, tokenizer_files

TEXTS = ("Hello, world!  two\n\n spaces ", "<|start|>user\nx<|end|>", "naïve ab")
VOCAB = 1000


def llama(**options):
    """A tokenizer with a class of its own, a metaspace and bytes."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", "a", "b", "▁a", "ab", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=[("▁", "a"), ("a", "b")], pad_token="<pad>", **options)


def gpt2():
    vocab = byte_tokenizer().get_vocab()
    return GPT2Tokenizer(vocab={**vocab, "<|endoftext|>": len(vocab)}, merges=[])


def left():
    """One in the state that calibration leaves it in."""
    tokenizer = byte_tokenizer(add_bos=True)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.model_max_length = 77
    tokenizer("a", padding="max_length", max_length=9, truncation=True)
    return tokenizer


MAKERS = {
    "bytes": byte_tokenizer,
    "bos": lambda: byte_tokenizer(add_bos=True),
    "no template": lambda: byte_tokenizer(chat_template=None),
    "left": left,
    "gpt2": gpt2,
    "llama": lambda: llama(add_bos_token=True),
    "llama eos": lambda: llama(add_bos_token=True, add_eos_token=True),
    "llama bare": lambda: llama(add_bos_token=False),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_tokenizer_comes_through(name):
    tokenizer = MAKERS[name]()
    files = tokenizer_files(tokenizer)
    again = make_tokenizer(files, VOCAB)
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert again.encode(text, add_special_tokens=special) == ids
            assert again.decode(ids) == tokenizer.decode(ids)
        assert set(again(text)) == set(tokenizer(text))
    for field in ("padding_side", "truncation_side", "model_max_length", "chat_template", "all_special_ids"):
        assert getattr(again, field) == getattr(tokenizer, field)
    for kind in ("bos", "eos", "pad", "unk"):
        assert getattr(again, f"{kind}_token_id") == getattr(tokenizer, f"{kind}_token_id")
    assert tokenizer_files(again) == files


def test_nothing_else_leaves():
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = "/home/canary"
    tokenizer.init_kwargs |= {"note": "canary", "tokenizer_file": "/canary", "auto_map": {"canary": 1}}
    tokenizer("a", padding="max_length", max_length=123, truncation=True)
    files = tokenizer_files(tokenizer)
    assert sorted(files) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert not any(b"canary" in data for data in files.values())
    parts = json.loads(files["tokenizer.json"])
    assert parts["padding"] is parts["truncation"] is None
    assert tokenizer.backend_tokenizer.padding is not None, "the owner's tokenizer was changed"
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_of_several_templates_the_default_leaves():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "rag": "canary"}
    assert tokenizer_files(tokenizer)["chat_template.jinja"] == CHATML.encode()
    tokenizer.chat_template = {"rag": "canary"}
    assert "chat_template.jinja" not in tokenizer_files(tokenizer)


def test_a_tokenizer_of_another_library_is_refused():
    with pytest.raises(KitError, match="a Own cannot leave"):
        tokenizer_files(type("Own", (PreTrainedTokenizerBase,), {})())


def changed(**values):
    files = tokenizer_files(byte_tokenizer())
    settings = json.loads(files["tokenizer_config.json"]) | values
    return files | {"tokenizer_config.json": canonical({k: v for k, v in settings.items() if v is not ...})}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"auto_map": {"AutoTokenizer": ["x.py", None]}}, "has the unknown key 'auto_map'"),
        ({"tokenizer_file": "/etc/passwd"}, "has the unknown key 'tokenizer_file'"),
        ({"chat_template": "x"}, "has the unknown key 'chat_template'"),
        ({"added_tokens_decoder": {}}, "has the unknown key 'added_tokens_decoder'"),
        ({"name_or_path": "x"}, "has the unknown key 'name_or_path'"),
        ({"padding_side": ...}, "has no padding_side"),
        ({"tokenizer_class": "Evil"}, "tokenizer_class is 'Evil', not PreTrainedTokenizerFast"),
        ({"tokenizer_class": ["x"]}, "tokenizer_class is"),
        ({"model_max_length": 0}, "model_max_length is 0"),
        ({"model_max_length": 10**33}, "model_max_length is"),
        ({"padding_side": "up"}, "padding_side is 'up'"),
        ({"split_special_tokens": 1}, "split_special_tokens is 1, not true or false"),
        ({"model_input_names": ["__class__"]}, "model_input_names is '__class__'"),
        ({"model_input_names": ["input_ids"] * 17}, "model_input_names has 17 items"),
        ({"model_input_names": []}, r"model_input_names is \[\]; it must begin with input_ids"),
        ({"model_input_names": ["attention_mask", "input_ids"]}, "must begin with input_ids, each once"),
        ({"model_input_names": ["input_ids", "input_ids"]}, "must begin with input_ids, each once"),
        ({"extra_special_tokens": [1]}, "a special token is 1"),
        ({"extra_special_tokens": ["<|pad|>"] * 10_001}, "extra_special_tokens has 10001 items"),
        ({"extra_special_tokens": ["<new>"]}, "extra_special_tokens has '<new>', which is not in tokenizer.json"),
        ({"pad_token": "<new>"}, "pad_token is '<new>', which is not in tokenizer.json"),
        ({"pad_token": ""}, "a special token is ''"),
        ({"eos_token": {"content": "<|end|>"}}, "a special token is"),
    ],
)
def test_its_config_is_checked_and_named(values, words):
    with pytest.raises(KitError, match=words) as caught:
        make_tokenizer(changed(**values), VOCAB)
    assert str(caught.value).startswith("tokenizer_config.json")


def test_without_an_end_no_row_can_be_tokenised():
    with pytest.raises(KitError, match="has no eos_token"):
        make_tokenizer(changed(eos_token=...), VOCAB)


def backend(**parts):
    files = tokenizer_files(byte_tokenizer())
    whole = json.loads(files["tokenizer.json"]) | parts
    return files | {"tokenizer.json": json.dumps({k: v for k, v in whole.items() if v is not ...}).encode()}


FIXED = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"padding": {**FIXED, "pad_to_multiple_of": None}}, "padding is .*, not null"),
        ({"truncation": {"max_length": 1}}, "truncation is .*, not null"),
        ({"code": 1}, "has the unknown key 'code'"),
        ({"model": ...}, "has no model"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "is no tokenizer"),
        ({"version": "9.0"}, "is no tokenizer"),
    ],
)
def test_its_backend_is_checked_and_named(parts, words):
    with pytest.raises(KitError, match=words) as caught:
        make_tokenizer(backend(**parts), VOCAB)
    assert str(caught.value).startswith("tokenizer.json")


def test_a_panic_in_rust_is_an_error_in_words(monkeypatch):
    class Panic(BaseException):
        pass

    class Tokenizer:
        @staticmethod
        def from_str(text):
            raise Panic("called `unwrap()` on a `None` value")

    files = tokenizer_files(byte_tokenizer())
    monkeypatch.setattr(kit_tokenizer, "Tokenizer", Tokenizer)
    with pytest.raises(KitError, match="is no tokenizer"):
        make_tokenizer(files, VOCAB)


def test_what_fails_only_in_use_is_refused_before():
    files = tokenizer_files(byte_tokenizer(add_bos=True))
    whole = json.loads(files["tokenizer.json"])
    whole["post_processor"]["special_tokens"].pop("<|bos|>")
    with pytest.raises(KitError, match=r"tokenizer\.json is no tokenizer that can be used: it fails when a text"):
        make_tokenizer(files | {"tokenizer.json": json.dumps(whole).encode()}, VOCAB)


def test_a_template_must_be_text():
    with pytest.raises(KitError, match="no tokenizer that can be used"):
        make_tokenizer(tokenizer_files(byte_tokenizer()) | {"chat_template.jinja": b"\xff"}, VOCAB)
