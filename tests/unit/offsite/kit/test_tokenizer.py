"""Tokenizers of a kit: those of the families come through, and no other class, path or code."""

import json

import pytest
from support.tokenizer import CHATML, byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siftune.base.errors import KitError
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
        ({"eos_token": ...}, "has no eos_token"),
        ({"tokenizer_class": "Evil"}, "tokenizer_class is 'Evil', not PreTrainedTokenizerFast"),
        ({"tokenizer_class": ["x"]}, "tokenizer_class is"),
    ],
)
def test_its_config_is_checked_and_named(values, words):
    with pytest.raises(KitError, match=words) as caught:
        make_tokenizer(changed(**values), VOCAB)
    assert str(caught.value).startswith("tokenizer_config.json")


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


def test_every_token_needs_an_embedding():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    files = tokenizer_files(tokenizer)
    assert len(make_tokenizer(files, 261)) == 261
    with pytest.raises(KitError, match=r"tokenizer\.json: '<new>' is token 260 of 260 embeddings"):
        make_tokenizer(files, 260)
    with pytest.raises(KitError, match=r"tokenizer\.json: '<other>' is token 261 of 261 embeddings"):
        make_tokenizer(files | changed(pad_token="<other>") | {"tokenizer.json": files["tokenizer.json"]}, 261)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"a":' * 1_000_000),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_damaged_files_are_refused(name, data):
    with pytest.raises(KitError, match=r"tokenizer\.json"):
        make_tokenizer(tokenizer_files(byte_tokenizer()) | {name: data}, VOCAB)
