"""Tokenizers of a kit: those of the families come through, and those that alter a text are refused.

Files and rows are those of somebody else; each goes the way of `siftune train`.
"""

import json
import resource

import pytest
from support.tokenizer import CHATML, byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siftune.base.errors import InputError, KitError
from siftune.data.encode import Encoder
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
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
    with pytest.raises(KitError, match="a Own cannot be put in a kit"):
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
        ({"extra_special_tokens": ["<new>"]}, "has the special token '<new>'; tokenizer.json has none"),
        ({"pad_token": "<new>"}, "has the special token '<new>'; tokenizer.json has none"),
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


# a pattern of the kind of Llama 3's and Qwen2's
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "l", "o"]


def _with(model, **parts):
    core = Tokenizer(model)
    for name, part in parts.items():
        setattr(core, name, part)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def byte_level(**parts):
    """One token per byte, with a beginning and an end."""
    parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(False), "decoder": decoders.ByteLevel()} | parts
    return _with(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *BYTES])}, []), **parts)


def sentence_piece(model=None, **parts):
    """Pieces with a mark for spaces, and bytes for the rest."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    merges = [("▁", "a"), ("a", "b")]
    model = model or models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return _with(model, post_processor=around(number=1), **parts)


def around(start="<s>", number=0):
    return processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[("<s>", number), ("</s>", number + 1)]
    )


def split_bytes(pattern):
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


MARKED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
UNMARKED = decoders.Sequence([*MARKED, decoders.Strip(" ", 1, 0)])
FAMILIES = {
    "gpt2": lambda: byte_level(post_processor=processors.ByteLevel(trim_offsets=False)),
    "gpt2 with a space": lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "opt": lambda: byte_level(post_processor=around("</s>")),
    "gpt_neox": lambda: byte_level(normalizer=normalizers.NFC(), post_processor=around()),
    "smollm2": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "llama2": lambda: sentence_piece(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), decoder=UNMARKED
    ),
    "llama3": lambda: byte_level(
        pre_tokenizer=split_bytes(WORDS), post_processor=processors.Sequence([processors.ByteLevel(), around()])
    ),
    "qwen2": lambda: byte_level(normalizer=normalizers.NFC(), pre_tokenizer=split_bytes(WORDS)),
    "gemma": lambda: sentence_piece(
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        decoder=decoders.Sequence(MARKED),
    ),
    "mistral": lambda: sentence_piece(
        pre_tokenizer=pre_tokenizers.Metaspace("▁", "first", split=False), decoder=UNMARKED
    ),
    "unigram": lambda: sentence_piece(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], 0, True),
        pre_tokenizer=pre_tokenizers.Metaspace("▁", "always"),
        decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")]),
    ),
}
ROWS = rows_from(
    {"prompt": prompt, "completion": completion}
    for prompt, completion in (
        ("It is not so.", " No."),
        ("<s>[INST] Hi </s> there </s>", "  two\n\n spaces 1234"),
        ("nai\u0308ve \ufdfa 東京 👩\u200d💻", "'S and  \t tabs\r\n"),
    )
)


def tokens(tokenizer, rows=ROWS):
    return tokenize_rows(rows, tokenizer, 10**6, "none").to_list()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_tokenised_as_by_transformers(name):
    tokenizer = FAMILIES[name]()
    kit = make_tokenizer(tokenizer_files(tokenizer), 300)
    assert tokens(kit) == tokens(tokenizer)
    assert kit.normalizers == {"gpt_neox": ["NFC"], "qwen2": ["NFC"]}.get(name, kit.normalizers)


def parts_of(tokenizer=None):
    return json.loads(tokenizer_files(tokenizer or byte_tokenizer())["tokenizer.json"])


def made(**parts):
    """The tokenizer of bytes with other parts."""
    files = tokenizer_files(byte_tokenizer(None))
    whole = json.loads(files["tokenizer.json"]) | parts
    return make_tokenizer(files | {"tokenizer.json": json.dumps(whole).encode()}, VOCAB)


def sequence(kind, *items):
    return {"type": "Sequence", kind: [*items]}


def replace(old, new, kind="String"):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def split(pattern, behavior="Isolated"):
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
    return sequence("pretokenizers", part, LEVEL)


def post(*pieces, **special):
    entry = {"id": "<|bos|>", "ids": [1], "tokens": ["<|bos|>"]} | special
    return {"type": "TemplateProcessing", "single": [*pieces], "pair": [*pieces], "special_tokens": {"<|bos|>": entry}}


def model(**fields):
    return {"model": parts_of()["model"] | fields}


def vocabulary(**more):
    return parts_of()["model"]["vocab"] | more


def added(**fields):
    token = {"id": 260, "content": "<new>", "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"added_tokens": [*parts_of()["added_tokens"], token | fields]}


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
A, BOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
REFUSED = {
    "a word": {"normalizer": replace("not ", "")},
    "a pattern": {"normalizer": replace("n.t", "", "Regex")},
    "a prefix": {"normalizer": {"type": "Prepend", "prepend": "evil "}},
    "growth": {"normalizer": sequence("normalizers", *[replace("a", "aa")] * 36)},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 88}},
    "case": {"normalizer": {"type": "Lowercase"}},
    "compatible forms": {"normalizer": {"type": "NFKC"}},
    "unknown key": {"normalizer": {"type": "NFC", "form": 1}},
    "unknown place": {"pre_tokenizer": {"type": "Whitespace"}},
    "a removed word": {"pre_tokenizer": split("not", "Removed")},
    "words in a decoder": {"decoder": sequence("decoders", replace("x", "y"), {"type": "ByteLevel"})},
    "no decoder": {"decoder": None},
    "a prefix of tokens": {"post_processor": post(BOS, BOS, A)},
    "a prefix of numbers": {"post_processor": post(BOS, A, ids=[1, 9, 9], tokens=["<|bos|>", "a", "b"])},
    "a prefix of letters": {"post_processor": post(BOS, A, ids=[100], tokens=["a"])},
    "a number past the embeddings": {"post_processor": post(BOS, A, ids=[10**6])},
    "a text twice": {"post_processor": post(A, A)},
    "no text": {"post_processor": post(BOS)},
    "many numbers": {"post_processor": post(*[BOS] * 10**3, A, ids=[1] * 10**3, tokens=["a"] * 10**3)},
    "chance": model(dropout=0.5),
    "words": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
    "no model": {"model": None},
    "a token past the embeddings": model(vocab=vocabulary(zz=VOCAB)),
    "two tokens of one number": model(vocab=vocabulary(zz=5)),
    "a merge to a special number": model(vocab=vocabulary(ab=3), merges=[["a", "b"]]),
    "no letter": model(vocab={token: number for token, number in vocabulary().items() if token != "e"}),
    "no é": model(vocab={token: number for token, number in vocabulary().items() if token != "Ã"}),
    "padding": {"padding": {"strategy": "BatchLongest"}},
    "an unknown part": {"code": "x"},
    "half of a pair": {"normalizer": {"type": "Prepend", "prepend": "\ud800"}},
    "a pattern that fails on prose": {"pre_tokenizer": split(r"who (\w+ ?)*$")},
    "a pattern without end": {"pre_tokenizer": split(r"(?:(?:\w|\s)+)+\1zz|((?:\w+\s?)+)+$")},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_alters_texts_is_refused_by_the_trial(name):
    with pytest.raises(KitError, match="tokenizer"):
        made(**REFUSED[name])


LATE = {
    "a rare word": ({"pre_tokenizer": split("Parisian", "Removed")}, "A Parisian."),
    "a rare special word": (added(content="Parisian", rstrip=True), "A Parisian  cat."),
    "a pattern that fails": ({"pre_tokenizer": split(r"zz(a|a)*$")}, "zz" + "a" * 64 + "!"),
}


@pytest.mark.parametrize("name", LATE)
def test_a_tokenizer_that_alters_a_text_is_refused_with_the_row(name):
    parts, text = LATE[name]
    tokenizer = made(**parts)
    assert tokens(tokenizer, ROWS[:1])
    with pytest.raises(InputError, match=r"row 1: the tokenizer fails on the text \(tokenizer\.json"):
        tokens(tokenizer, rows_from([{"text": text}]))


def test_an_added_token_needs_an_embedding():
    """The library gives it the next free number, whatever the file says."""
    files = tokenizer_files(byte_tokenizer())
    whole = parts_of() | added(id=100)
    files["tokenizer.json"] = json.dumps(whole).encode()
    assert len(make_tokenizer(files, 261)) == 261
    with pytest.raises(KitError, match="token 260 of 260 embeddings"):
        make_tokenizer(files, 260)


def test_forty_thousand_equal_letters_take_two_seconds_of_processor_time():
    tokenizer = made(pre_tokenizer=split("[a-y]+[0-9]"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(InputError, match="row 1"):
        Encoder(tokenizer, "none").encode(rows_from([{"text": "a" * 40_000}]))
    tokenizer.child.stop()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2 + 1  # the first start of the child counts too


def test_other_processes_and_files_get_an_ordinary_tokenizer(tmp_path):
    tokenizer = made()
    tokenizer.save_pretrained(tmp_path)
    assert "KitTokenizer" not in (tmp_path / "tokenizer_config.json").read_text()
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)("It's").input_ids == tokenizer("It's").input_ids


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_files_must_be_text(name):
    with pytest.raises(KitError, match="cannot be used"):
        make_tokenizer(tokenizer_files(byte_tokenizer()) | {name: b"\xff"}, VOCAB)
