"""Hostile tokenizers, their settings and chat templates: those that ask for more than there is, and damaged ones."""

import json

from support.damage import at, byte_mutations, dump, mutations, places, some_of, with_value
from support.tokenizer import CHATML


def some(pairs, count, generator):
    """A sample of them, or all."""
    pairs = list(pairs)
    return generator.sample(pairs, min(count, len(pairs)))


def dumped(pairs):
    """What was done -> bytes of the JSON."""
    return [(what, dump(value)) for what, value in pairs]


def tokenizers(whole, generator):
    """Components and numbers of tokenizer.json, and those that ask for more than there is."""
    among = some_of(whole["model"]["vocab"], generator, 2)
    pairs = dumped(some(mutations(whole, among), 130, generator))
    for path in filter(among, places(whole)):
        if type(at(whole, path)) is int:
            for number in generator.sample((319, 320, 10**5, 2**31, 2**32 - 1, 2**32, 2**64, -1), 3):
                pairs.append((f"{path} = {number}", dump(with_value(whole, path, number))))
    return pairs + dumped(_bombs(whole))


def _replace(old, new):
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bombs(whole):
    """Tokenizers that ask for much memory or time, or fail in use."""
    doubling = [_replace("a", "aa")] * 36
    bigram = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing", "single": [special] * 10_000 + [bigram], "pair": [bigram, bigram],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [1] * 10_000, "tokens": ["<|bos|>"] * 10_000}},
    }  # fmt: skip
    past = {**template, "single": [special, bigram]}
    past["special_tokens"] = {"<|bos|>": {"id": "<|bos|>", "ids": [5000], "tokens": ["<|bos|>"]}}
    levels = whole["pre_tokenizer"]
    parts = {
        "normalizer": [
            {"type": "Sequence", "normalizers": doubling},
            {"type": "Sequence", "normalizers": [_replace("q", "qq")] * 36},
            {"type": "Prepend", "prepend": "x" * 4_000_000},
            _replace("", "x" * 1000),
            {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "b"},
            {"type": "Replace", "pattern": {"Regex": "("}, "content": "b"},
            {"type": "Precompiled", "precompiled_charsmap": "A" * 88},
            {"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": ""}, _replace("a", ""),
            {"type": "Lowercase"}, {"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
             "lowercase": True},
        ],
        "pre_tokenizer": [
            {"type": "Sequence", "pretokenizers": [levels] * 100_000},
            {"type": "Sequence", "pretokenizers": [_split(r"^(\w+ ?)*$"), levels]},
            {"type": "Sequence", "pretokenizers": [_split(r"(a*)*b"), levels]},
            {"type": "Sequence", "pretokenizers": [_split(""), levels]},
            {"type": "Sequence", "pretokenizers": [{**_split("."), "behavior": "Removed"}, levels]},
            {"type": "Sequence", "pretokenizers": [_split("a*a*b")] * 15 + [levels]},
            {"type": "Sequence", "pretokenizers": [_split("(?:a{1,500}){1,500}b"), levels]},
            {"type": "Sequence", "pretokenizers": [_split(r"(.+)\1+!"), levels]},
            {"type": "Sequence", "pretokenizers": [_split(r"(?<p>\((?:[^()]|\g<p>)*\))"), levels]},
            {"type": "FixedLength", "length": 1}, {"type": "UnicodeScripts"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            {"type": "Whitespace"}, {**levels, "use_regex": True}, None,
        ],
        "decoder": [
            {"type": "Sequence", "decoders": doubling},
            {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": ""}, "content": "yy"}] * 30},
            {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}, {"type": "Fuse"}, None,
        ],
        "post_processor": [
            template, past, {**template, "single": [special], "pair": []},
            {**template, "single": [{"Sequence": {"id": "B", "type_id": 0}}]},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        ],
    }  # fmt: skip
    for name, choices in parts.items():
        for place, choice in enumerate(choices):
            yield f"{name} {place}: {json.dumps(choice)[:60]}", {**whole, name: choice}
    model = whole["model"]
    vocab = model["vocab"]
    yield "half of a surrogate pair", {**whole, "model": {**model, "vocab": {**vocab, "\ud800": len(vocab)}}}
    yield "a token past the embeddings", {**whole, "model": {**model, "vocab": {**vocab, "zz": 320}}}
    yield "two tokens of a number", {**whole, "model": {**model, "vocab": {**vocab, "zz": 5}}}
    yield "no letter a", {**whole, "model": {**model, "vocab": {key: n for key, n in vocab.items() if key != "a"}}}
    yield "many tokens", {**whole, "model": {**model, "vocab": {f"t{n}": n for n in range(300_000)}}}
    yield "many merges", {**whole, "model": {**model, "merges": [["a", "a"]] * 100_000}}
    yield from _models(whole)
    added = whole["added_tokens"]
    yield "two numbers of an added token", {**whole, "added_tokens": [*added, {**added[0], "id": 10}]}
    yield "an added token of another's number", {**whole, "added_tokens": [*added, {**added[0], "content": "zzz"}]}
    yield "an added letter", {**whole, "added_tokens": [*added, {**added[0], "id": vocab["a"], "content": "a"}]}
    nothing = {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
    yield (
        "an added token of nothing",
        {**whole, **nothing, "added_tokens": [*added, {**added[0], "id": 10, "content": " ", "normalized": True}]},
    )
    yield (
        "an added token past the embeddings",
        {**whole, "added_tokens": [*added, {**added[0], "id": 9999, "content": "z"}]},
    )
    yield "an empty added token", {**whole, "added_tokens": [*added, {**added[0], "id": 4, "content": ""}]}
    yield (
        "many added tokens",
        {**whole, "added_tokens": [{**added[0], "id": n, "content": f"<{n}>"} for n in range(20_000)]},
    )


def _models(whole):
    """Models of other kinds and settings."""
    model, vocab = whole["model"], whole["model"]["vocab"]
    for name, value in (
        ("unk_token", "nope"), ("fuse_unk", True), ("byte_fallback", True), ("continuing_subword_prefix", "##"),
        ("end_of_word_suffix", "</w>"), ("ignore_merges", True), ("vocab", {"a": 0, "b": 1}), ("vocab", {}),
    ):  # fmt: skip
        yield f"{name} is {value!r}", {**whole, "model": {**model, name: value}}
    for unknown in ("<|bos|>", "zz", "", None):
        yield f"words, {unknown!r}", {**whole, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}}
    for score in (-1.0, 1e308, -1e308, True, 0):
        for unknown, fallback, count in (
            (0, False, 400),
            (None, False, 60),
            (0, True, 60),
            (0, True, 0),
            (5, False, 2),
        ):
            scored = [[token, score] for token in [*vocab][:count]]
            one = {"type": "Unigram", "vocab": scored, "unk_id": unknown, "byte_fallback": fallback}
            yield f"{len(scored)} tokens of {score}, unknown {unknown}, {fallback}", {**whole, "model": one}


def tokenizer_configs(whole, generator):
    """Keys and values of tokenizer_config.json."""
    pairs = some(mutations(whole), 60, generator)
    ends = [key for key in whole if key.endswith("_token")]
    pairs += [(f"without {key}", {name: v for name, v in whole.items() if name != key}) for key in ends]
    pairs.append(("without any token", {name: value for name, value in whole.items() if name not in ends}))
    pairs += [(f"{key} is {word!r}", {**whole, key: word}) for key in ends for word in ("a", "\ud800", "zz", "<|end|>")]
    names = ([], ["attention_mask"], ["token_type_ids", "input_ids"], ["input_ids", "input_ids"], ["input_ids"])
    pairs += [(f"inputs {list(some)}", {**whole, "model_input_names": list(some)}) for some in names]
    pairs.append(("letters are special", {**whole, "extra_special_tokens": ["a", "e", "2"]}))
    pairs += [(f"at most {n}", {**whole, "model_max_length": n}) for n in (1, 2, 8, 10**31)]
    return dumped(pairs)


_HOSTILE = (
    "", " ", "x", "{{", "{% for m in messages %}", "{{ messages }}", "{{ messages[0].content }}", "{{ messages[-1] }}",
    "{% for i in range(999999999) %}{% endfor %}", "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}", "{{ 10 ** 10 ** 8 }}", "{{ ('a' * 10**5) * 10**5 }}", "{{ 'a'.ljust(10**10) }}",
    "{{ '%99999999999d' % 1 }}", "{{ '{:>9999999999}'.format(1) }}", 
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ ''.__class__.__mro__ }}", "{{ self.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "{% include 'x' %}", "{% import 'x' as x %}", "{% extends 'x' %}", "{{ raise_exception('no') }}",
    "{{ nothing.at.all }}",
    "{{ 1 / 0 }}", "{{ messages[9] }}", "{{ messages | tojson }}", "{{ strftime_now('%Y') }}", "{{ lipsum(n=9999) }}",
    CHATML.replace("m.content", "m.content | upper"), CHATML.replace("m.content", "m.content[:3]"),
    CHATML.replace("m.content", "m.content | trim"), CHATML.replace("m.content", "m.content * 1000"),
    CHATML.replace("m.content", "m.content | length"), CHATML.replace("m.content", "'\\ud800'"),
    CHATML.replace("<|end|>", "\x00"), CHATML.replace("m.role", "messages | length"),
    CHATML.replace("messages", "messages[:1]"), CHATML.replace("messages", "messages | reverse"),
    "{{ strftime_now('%f') }}" + CHATML, "{{ strftime_now('%d %b') }}" + CHATML, "{{ range(9) | random }}" + CHATML,
    "{{ lipsum(n=1) }}" + CHATML, CHATML.replace("m.content", "m.content | e"),
    CHATML.replace("{{ m.content", "{% if 'é' in m.content %}{{ m.content").replace("t }}<", "t }}{% endif %}<"),
    CHATML.replace("{{ m.content", "{% if m.content | length > 9 %}{{ m.content").replace("t }}<", "t }}{% endif %}<"),
    CHATML.replace("{{", "{% for a in m.content %}{% for b in m.content %}{% endfor %}{% endfor %}{{", 1),
    *("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(" + n + ") }}" + CHATML for n in
      ("20", "100", "110", "120", "150", "180", "200")),
    CHATML.replace("<|end|>", "<|end|>" * 5000), CHATML.replace("add_generation_prompt", "not add_generation_prompt"),
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
)  # fmt: skip


def templates(sound_one, generator):
    """Chat templates that run long, write much, leave something out, or want what is not theirs; and damaged ones."""
    pairs = [(text[:50], text.encode()) for text in _HOSTILE]
    return pairs + some(
        [pair for pair in byte_mutations(sound_one, generator, 30) if pair[1] != sound_one], 20, generator
    )
