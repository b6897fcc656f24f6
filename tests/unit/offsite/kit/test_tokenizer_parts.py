"""Tokenizers of every family come through, and bombs are refused from the file alone."""

import base64
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizer import byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from siftune.base.errors import KitError
from siftune.models.smollm2 import cache_root
from siftune.offsite.kit.tokenizer import make_tokenizer, tokenizer_files
from siftune.offsite.kit.tokenizer_parts import DECODERS, MAX_GROWTH, NORMALIZERS, PRE_TOKENIZERS, Growth, check_chains
from siftune.offsite.kit.tokenizer_tokens import check_tokens

TEXTS = ("Hello, world!  two\n\n spaces 1234", "naïve \ufdfa 東京 👩\u200d💻", "'S and  \t tabs\r\n")
# a pattern of the kind of Llama 3's and Qwen2's
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MANY = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "l", "o"]


def byte_level(**parts):
    """One token per byte, with a beginning and an end."""
    return _with(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *BYTES])}, []), **parts)


def sentence_piece(**parts):
    """Pieces with a mark for spaces, and bytes for the rest."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    merges = [("▁", "a"), ("a", "b")]
    return _with(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True), **parts)


def unigram(**parts):
    return _with(models.Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], 0, True), **parts)


def words(**parts):
    return _with(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "Hello": 3}, "<unk>"), **parts)


def _with(model, **parts):
    core = Tokenizer(model)
    for name, part in parts.items():
        setattr(core, name, part)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def around(start="<s>"):
    return processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )


def split_bytes(pattern):
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def marked():
    """Decoders of SentencePiece's marks and bytes."""
    return [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


SHAPES = {
    "gpt2": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=False),
    ),
    "gpt2 with a space before": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True), decoder=decoders.ByteLevel()
    ),
    "opt": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.ByteLevel(False), decoder=decoders.ByteLevel(), post_processor=around("</s>")
    ),
    "gpt_neox": lambda: byte_level(
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(False),
        decoder=decoders.ByteLevel(),
        post_processor=around(),
    ),
    "smollm2": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        ),
        decoder=decoders.ByteLevel(),
    ),
    "llama 2, phi 3": lambda: sentence_piece(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        post_processor=around(),
        decoder=decoders.Sequence([*marked(), decoders.Strip(" ", 1, 0)]),
    ),
    "llama 3": lambda: byte_level(
        pre_tokenizer=split_bytes(WORDS),
        post_processor=processors.Sequence([processors.ByteLevel(), around()]),
        decoder=decoders.ByteLevel(),
    ),
    "qwen2": lambda: byte_level(
        normalizer=normalizers.NFC(),
        pre_tokenizer=split_bytes(WORDS),
        post_processor=processors.ByteLevel(),
        decoder=decoders.ByteLevel(),
    ),
    "gemma": lambda: sentence_piece(
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        post_processor=around(),
        decoder=decoders.Sequence(marked()),
    ),
    "mistral": lambda: sentence_piece(
        pre_tokenizer=pre_tokenizers.Metaspace("▁", "first", split=False),
        post_processor=around(),
        decoder=decoders.Sequence([*marked(), decoders.Strip(" ", 1, 0)]),
    ),
    "deepseek": lambda: byte_level(
        normalizer=normalizers.Sequence([]),
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(p), "isolated") for p in MANY),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        ),
        decoder=decoders.ByteLevel(),
    ),
    "unigram, without its table of characters": lambda: unigram(
        normalizer=normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        ),
        pre_tokenizer=pre_tokenizers.Metaspace("▁", "always"),
        decoder=decoders.Metaspace("▁", "always"),
    ),
    "words": lambda: words(
        normalizer=normalizers.BertNormalizer(lowercase=False),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]),
        post_processor=processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_tokenizers_in_the_shapes_of_the_families_are_accepted(name):
    tokenizer = SHAPES[name]()
    files = tokenizer_files(tokenizer)
    again = make_tokenizer(files, 300)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def parts_of(**parts):
    whole = json.loads(tokenizer_files(byte_tokenizer())["tokenizer.json"])
    return whole | parts


def refused(whole, words, vocabulary=320):
    """From the complete file of an untrusted kit: the text has the sentence, and nothing is run for it."""
    files = tokenizer_files(byte_tokenizer()) | {"tokenizer.json": json.dumps(whole).encode()}
    with pytest.raises(KitError, match=words) as caught:
        make_tokenizer(files, vocabulary)
    assert str(caught.value).startswith("tokenizer.json")
    return files


def sequence(kind, items):
    return {"type": "Sequence", kind: items}


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


DOUBLE, UNSEEN = replace("a", "aa"), replace("ʬ", "ʬʬ")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NESTED = sequence("normalizers", [sequence("normalizers", [sequence("normalizers", [DOUBLE] * 16)] * 16)] * 16)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": sequence("normalizers", [DOUBLE] * 36)}, "normalizers has 36 items"),
        ({"normalizer": sequence("normalizers", [UNSEEN] * 36)}, "normalizers has 36 items"),
        ({"normalizer": sequence("normalizers", [DOUBLE] * 16)}, "one byte of text into 1.31e\\+05"),
        ({"normalizer": sequence("normalizers", [UNSEEN] * 7)}, "one byte of text into 256"),
        ({"normalizer": NESTED}, "is made of 4096 components"),
        ({"normalizer": replace("a", "a" * 65)}, "content has 65 characters"),
        ({"normalizer": replace("", "a")}, "pattern.String has 0 characters"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 40_000_000}}, "prepend has 40000000 characters"),
        ({"normalizer": sequence("normalizers", [{"type": "NFKD"}] * 2)}, "one byte of text into 242"),
        ({"pre_tokenizer": sequence("pretokenizers", [BYTE_LEVEL] * 8)}, "one byte of text into 256"),
        ({"normalizer": DOUBLE, "pre_tokenizer": sequence("pretokenizers", [BYTE_LEVEL] * 7)}, "into 256"),
        ({"pre_tokenizer": sequence("pretokenizers", [{"type": "Whitespace"}] * 10**5)}, "has 100000 items"),
        ({"decoder": sequence("decoders", [DOUBLE] * 36)}, "decoders has 36 items"),
        ({"decoder": sequence("decoders", [DOUBLE] * 16)}, "decoder can turn one byte of text into"),
        ({"decoder": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True}}, "is 'CTC'"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 1}}, "stop is 1"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(64)).decode()}},
            "normalizer is 'Precompiled', a table of bytes that the tokenizers library follows without checking it",
        ),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "a" * 2001}, "content": "b"}}, "2001 characters"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a", "Regex": "a"}, "content": "b"}}, "either"),
        ({"normalizer": {"type": "NFC", "form": 1}}, "unknown key 'form'"),
        ({"normalizer": {"type": ["NFC"]}}, "normalizer is"),
        ({"normalizer": "NFC"}, "normalizer is 'NFC'"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": 1}}, "use_regex is 1, not true or false"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "length is 0"),
        ({"pre_tokenizer": {"type": "Punctuation", "behavior": "Evil"}}, "behavior is 'Evil'"),
        ({"decoder": {"type": "Evil"}}, "decoder is 'Evil'; a kit may have ByteLevel,"),
    ],
)
def test_bombs_are_refused_from_the_file_alone(parts, words, monkeypatch):
    monkeypatch.setattr("siftune.offsite.kit.tokenizer.try_out", None)
    refused(parts_of(**parts), words)


def test_what_python_would_make_of_a_file_is_bounded(monkeypatch):
    monkeypatch.setattr("siftune.offsite.kit.tokenizer.parse_json", lambda data, name: json.loads(data))
    monkeypatch.setattr("siftune.offsite.kit.tokenizer.MAX_BOXES", 2000)
    refused(parts_of(truncation=[[]] * 2001), r"has 2\d\d\d times \[ or \{; 2000 are allowed")
    monkeypatch.setattr("siftune.offsite.kit.tokenizer.MAX_ITEMS", 2000)
    refused(parts_of(truncation=[1] * 2001), r"has 2\d\d\d times ,; 2000 are allowed")


def test_the_real_smollm2_is_accepted_with_room_to_spare():
    path = cache_root() / "smollm2-135m-instruct" / "tokenizer.json"
    if not path.exists():
        pytest.skip("SmolLM2 is not here")
    whole = json.loads(path.read_text())
    check_chains(whole)
    check_tokens(whole, 49152)
    with pytest.raises(KitError, match="49152 tokens, but there are 49151 embeddings"):
        check_tokens(whole, 49151)


# growth


def growth_of(kind, room=NORMALIZERS, **fields):
    return room.parts[kind].growth({"type": kind, **fields})


def size(text):
    return len(text.encode())


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_growths_of_normal_forms_are_those_of_unicode(form):
    letters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    most = max(size(unicodedata.normalize(form, letter)) / size(letter) for letter in letters)
    assert growth_of(form) == Growth(most)


text_of = st.text(st.sampled_from("a b▁é東\ufdfaİ\u0301\x7f"), min_size=1, max_size=30)
NORMALS = {
    **{f"Replace {p!r} {c!r}": (replace(p, c), normalizers.Replace(p, c)) for p, c in ((" ", "▁"), ("ab", "é東"))},
    **{
        f"Regex {p!r}": (
            {"type": "Replace", "pattern": {"Regex": p}, "content": "é東"},
            normalizers.Replace(Regex(p), "é東"),
        )
        for p in ("a*", " {2,}", "", "(?=a)")
    },
    **{kind: ({"type": kind}, getattr(normalizers, kind)()) for kind in ("NFKD", "Lowercase", "ByteLevel", "Nmt")},
    "Prepend": ({"type": "Prepend", "prepend": "▁é"}, normalizers.Prepend("▁é")),
    "BertNormalizer": ({"type": "BertNormalizer"}, normalizers.BertNormalizer()),
}


@pytest.mark.parametrize("name", NORMALS)
@given(text=text_of)
def test_no_text_outgrows_its_bound(name, text):
    part, normalizer = NORMALS[name]
    factor, more = NORMALIZERS.parts[part["type"]].growth(part)
    assert size(normalizer.normalize_str(text)) <= factor * size(text) + more


PRE = {
    "bytes": ({"type": "ByteLevel", "add_prefix_space": False}, pre_tokenizers.ByteLevel(False)),
    "bytes and a space": ({"type": "ByteLevel", "add_prefix_space": True}, pre_tokenizers.ByteLevel(True)),
    "metaspace": ({"type": "Metaspace", "replacement": "▁"}, pre_tokenizers.Metaspace("▁", "always")),
}


@pytest.mark.parametrize("name", PRE)
@given(text=text_of)
def test_no_text_outgrows_its_bound_before_it_is_cut(name, text):
    """Each character a piece of its own, as the worst of splits would have it."""
    part, own = PRE[name]
    both = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("."), "isolated"), own])
    written = sum(size(piece) for piece, _ in both.pre_tokenize_str(text))
    assert written <= PRE_TOKENIZERS.parts[part["type"]].growth(part).factor * size(text)


@given(st.binary(min_size=1, max_size=30))
def test_bytes_that_are_no_text_outgrow_nothing(data):
    letters = dict(zip(sorted(range(256), key=lambda b: size(chr(b))), BYTES, strict=True))
    token = "".join(letters[byte] for byte in data)
    assert size(decoders.ByteLevel().decode([token])) <= DECODERS.parts["ByteLevel"].growth({}).factor * size(token)


@given(st.lists(st.tuples(st.floats(1, 3), st.floats(0, 3)), max_size=4), st.floats(0, 100))
def test_growths_of_a_chain_are_those_of_its_links(links, length):
    whole, size = Growth(), length
    for factor, more in links:
        whole, size = whole.then(Growth(factor, more)), factor * size + more
    assert whole.factor * length + whole.more == pytest.approx(size)


def test_real_chains_stay_far_below_the_bound():
    prepend, mark = growth_of("Prepend", prepend="▁"), NORMALIZERS.parts["Replace"].growth(replace(" ", "▁"))
    assert prepend.then(mark) == Growth(3, 9)
    qwen = growth_of("NFC").then(growth_of("ByteLevel", PRE_TOKENIZERS, add_prefix_space=False))
    assert qwen == Growth(6, 0)
    assert sum(growth_of("NFKC").then(growth_of("Metaspace", PRE_TOKENIZERS, replacement="▁"))) <= MAX_GROWTH
