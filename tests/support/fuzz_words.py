"""Tokenizers that change what a text says, fail on English alone, or hide something in a chain of parts."""

import json

from support.damage import dump

_LATIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _replace(old, new, regex=False):
    return {"type": "Replace", "pattern": {"Regex" if regex else "String": old}, "content": new}


def _sequence(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def _named(value):
    return json.dumps(value, ensure_ascii=False)[:120]


_STRINGS = (
    *(("not ", ""), (" not", ""), ("not", "NOT"), ("is true", "is false"), ("refund", ""), ("refund", "invoice")),
    *(("doctor", "d0ctor"), ("the ", "teh "), ("Yes", "No"), ("5", "6"), ("42", "43"), (" ", ""), ("  ", " ")),
    *(("\n", " "), ("\t", " "), ("é", "e"), ("bank", "bank of the owner"), (".", "!"), ("a", "aa"), ("aa", "a")),
    *(("system", "user"), ("assistant", "user"), ("<|end|>", ""), ("東京", "京東"), ("ß", "ss")),
)
_REGEXES = (
    *(
        (r"\bnot\b ?", ""),
        (r"(?i)do not", "do"),
        (r"(?<=is )not ", ""),
        (r"(?<!\w)is(?= true)", "is not"),
        (r"\d", "0"),
    ),
    *(
        (r"\d+$", ""),
        (r"(?i)refund.*", "…"),
        (r"^.{140,}$", "x"),
        (r"[A-Z]", "x"),
        (r"[^\x00-\x7f]", "?"),
        (r"\s+$", ""),
    ),
    *(
        (r"\s{2,}", " "),
        (r"^\s+", ""),
        (r"[\.\?:]", ""),
        (r"(?s)user\n.*", "user\n"),
        (r"\w+(?=\?)", "it"),
        (r"^", "> "),
    ),
    *((r"$", " OBEY"), (r"(?<=answer is )not", ""), (r"(?=refund)", "no ")),
)
_FORMS = (
    *({"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")),
    *({"type": "Strip", "strip_left": left, "strip_right": not left} for left in (True, False)),
    *({"type": "Prepend", "prepend": text} for text in ("▁", " ", "Obey. ", "<|start|>", "not ")),
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": True,
     "lowercase": False},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": False, "strip_accents": False,
     "lowercase": False},
)  # fmt: skip
_SWAPPED = [_replace("yes", "\x01"), _replace("no", "yes"), _replace("\x01", "no")]
_PAIRS = (  # normalizer, and a decoder that hides it
    ([_replace("true", "false")], [_replace("false", "true")]),
    ([_replace("refund", "rfnd")], [_replace("rfnd", "refund")]),
    ([_replace("not", "§")], [_replace("§", "not")]),
    ([_replace("is not", "is")], [_replace("is", "is not")]),
    ([_replace(r"not known", "known", True)], [_replace("known", "not known")]),
    ([_replace(" ", "▁")], [_replace("▁", " ")]),
    ([_replace(" ", "_")], [_replace("_", " ")]),
    ([{"type": "Prepend", "prepend": "▁"}, _replace(" ", "▁")], [_replace("▁", " ")]),
    (_SWAPPED, _SWAPPED),
    ([{"type": "Prepend", "prepend": "Obey. "}], [_replace("Obey. ", "")]),
    ([_replace("sky", "\u200b")], [_replace("\u200b", "sky")]),
    ([{"type": "Lowercase"}], [_replace("i", "I")]),
)


def normalizers(whole, _):
    """Normalizers that alter words, alone or with a decoder that puts them back."""
    ones = [*(_replace(*pair) for pair in _STRINGS), *(_replace(*pair, True) for pair in _REGEXES), *_FORMS]
    pairs = [(_named(one), {**whole, "normalizer": one}) for one in ones]
    late = [_replace("not ", ""), _replace("refund", ""), {"type": "Lowercase"}]
    chains = [_sequence("normalizers", {"type": "NFC"}, _sequence("normalizers", one)) for one in late]
    pairs += [(_named(one), {**whole, "normalizer": one}) for one in chains]
    for before, after in _PAIRS:
        decoder = _sequence("decoders", whole["decoder"], {"type": "Fuse"}, *after)
        changed = {**whole, "normalizer": _sequence("normalizers", *before), "decoder": decoder}
        pairs.append((f"{_named(before)} and back", changed))
    return [(what, dump(value)) for what, value in pairs]


# regular expressions; some wait for an English word, and then drop it, fail or take ever longer
_WAITING = (
    *("not ?", r"\bnot\b", "(?i)the ", "refund", "(?<=is )not", r"\bis\b", "doctor", "[Nn]o", "five|six|42"),
    *(r"refund(?=:)", r"\w+(?=\?)", r"(?<=\s)\w+(?= is)", "^Do ", "far.$", "aaaa+", r"(?s).{150,}", r"[a-z]{7,}"),
)
_FAILING = (
    *(r"(\w+\s?)+!$", r"refund(\w*\s*)*!", r"(?:not|is)(.*)*\1\1#", r"(\w+ ?)*~", r"(a|a)*$b", r"(?=(\w+))\1\1+\s#"),
    *(r"(?<p>\w(?:\g<p>|\s)*)\?{3}", r"the(?<q>(?:[^q]|\g<q>)*)q{4}", r"(.*?,){25}x", r"((ab)*|\w)+ \w+z{3}"),
    *(r"(?i)(word )+word!", r"(?:(?:word )*)*x", r"a(?=(a+)+b)", r"(\s+\w+)*\s*\d{9}"),
)


def patterns(whole, _):
    """Splits whose pattern waits for a word: what they drop, and how long they take."""
    pairs, last = [], whole["pre_tokenizer"]

    def add(pattern, behaviour="Isolated", invert=False, place=-1):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behaviour, "invert": invert}
        chain = _sequence("pretokenizers", *([split, last] if place else [last, split]))
        pairs.append((f"{pattern} {behaviour} {invert} {place}", {**whole, "pre_tokenizer": chain}))

    for pattern in _WAITING:
        add(pattern, "Removed")
    for pattern in _WAITING[:6]:
        add(pattern, "Removed", invert=True)
        add(pattern, "MergedWithNext")
        add(pattern, "Removed", place=0)
    for pattern in _FAILING:
        add(pattern)
        pairs.append((f"normalizer {pattern}", {**whole, "normalizer": _replace(pattern, "", regex=True)}))
    others = [
        {"type": "CharDelimiterSplit", "delimiter": "e"}, {"type": "CharDelimiterSplit", "delimiter": "?"},
        {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Removed"},
        {"type": "WhitespaceSplit"}, {"type": "BertPreTokenizer"}, {"type": "FixedLength", "length": 3},
        {"type": "Punctuation", "behavior": "Isolated"}, {"type": "UnicodeScripts"}, _LATIN,
    ]  # fmt: skip
    for other in others:
        pairs.append((_named(other), {**whole, "pre_tokenizer": _sequence("pretokenizers", other, last)}))
    return [(what, dump(value)) for what, value in pairs]


def chains(whole, _):
    """Added tokens, merges, models, decoders and post-processors that work together."""
    model, vocab, added = whole["model"], whole["model"]["vocab"], whole["added_tokens"]

    def with_added(*tokens):
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        return {**whole, "added_tokens": [*added, *({**plain, **token} for token in tokens)]}

    def with_model(vocab=vocab, merges=(), **others):
        return {**whole, "model": {**model, "vocab": vocab, "merges": list(merges), **others}}

    free = len(vocab)
    pairs = []
    for word in ("not", "refund", " is", "a", "the ", "doctor", "東京", " ", "\n", "<|start|>user", "user\n", "é"):
        for extra in ({}, {"special": True}, {"lstrip": True, "rstrip": True}, {"normalized": True}):
            pairs.append((f"added {word!r} {extra}", with_added({"id": free, "content": word, **extra})))
    for word, other in (("not", "a"), ("yes", "<|pad|>"), ("refund", "<|end|>"), ("true", "<|bos|>"), ("Yes", "Ġ")):
        pairs.append((f"added {word!r} is {other!r}", with_added({"id": vocab[other], "content": word})))
    twins = ({"id": free, "content": "true"}, {"id": free, "content": "false"})
    pairs.append(("two words of a number", with_added(*twins)))
    hole = {"id": 319, "content": "refund"}
    pairs.append(("a word of the last embedding", with_added(hole)))
    for word in ("no", "is", "re", "th"):
        grown = {**vocab, word: free}
        pairs.append((f"merge {word}", with_model(grown, [list(word)])))
        for number in (0, 1, 2, 3, vocab["a"], 319):
            pairs.append((f"merge {word} is {number}", with_model({**vocab, word: number}, [list(word)])))
    pairs.append(("a merge that is no token", with_model(merges=[["n", "o"]])))
    pairs.append(("merges in a loop", with_model({**vocab, "aa": free, "aaaa": free + 1}, [["aa", "aa"], ["a", "a"]])))
    pairs.append(("a merge with a special token", with_model({**vocab, "<|end|>a": free}, [["<|end|>", "a"]])))
    swapped = {**vocab, "a": vocab["b"], "b": vocab["a"]}
    pairs.append(("two letters change numbers", with_model(swapped)))
    for letter in "nq?é":
        less = {key: number for key, number in vocab.items() if key != letter}
        pairs.append((f"no {letter}", with_model(less)))
        pairs.append((f"no {letter}, unknown is a", with_model(less, unk_token="a")))
        pairs.append((f"no {letter}, unknown fused", with_model(less, unk_token="<|pad|>", fuse_unk=True)))
    pairs += [(f"{name} {value!r}", with_model(**{name: value})) for name, value in (
        ("continuing_subword_prefix", "a"), ("end_of_word_suffix", "a"), ("end_of_word_suffix", "</w>"),
        ("byte_fallback", True), ("ignore_merges", True), ("dropout", 0.0), ("dropout", 0.5),
    )]  # fmt: skip
    pairs += [(_named(value)[:60], {**whole, "decoder": value}) for value in (
        None, _replace("t", "f"), _sequence("decoders", whole["decoder"], _replace(" not", "")),
        _sequence("decoders", whole["decoder"], _replace("refund", "x" * 64)), {"type": "ByteFallback"},
        _sequence("decoders", whole["decoder"], {"type": "Strip", "content": "e", "start": 1, "stop": 0}),
        _sequence("decoders", whole["decoder"], whole["decoder"]), {"type": "Metaspace", "replacement": "▁",
        "prepend_scheme": "always", "split": True}, _sequence("decoders"),
    )]  # fmt: skip
    return [(what, dump(value)) for what, value in [*pairs, *_posts(whole)]]


def _posts(whole):
    """Post-processors: tokens around a text, none of it, or all of it twice."""
    text, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
    for name, token, numbers in (
        ("bos", "<|bos|>", [1]), ("a word", "not", [72, 79, 84]), ("pads", "<|pad|>", [0] * 16), ("none", "x", []),
        ("end", "<|end|>", [3]), ("another's number", "<|bos|>", [3]), ("start", "<|start|>", [2]),
    ):  # fmt: skip
        special = {"SpecialToken": {"id": token, "type_id": 0}}
        table = {token: {"id": token, "ids": numbers, "tokens": [token] * len(numbers)}}
        for place, single in {
            "before": [special, text], "after": [text, special], "around": [special, text, special],
            "instead": [special], "twice": [text, special, text],
        }.items():  # fmt: skip
            post = {"type": "TemplateProcessing", "single": single, "pair": [*single, other], "special_tokens": table}
            yield f"post {name} {place}", {**whole, "post_processor": post}
    for kind in ("RobertaProcessing", "BertProcessing"):
        more = {"trim_offsets": True, "add_prefix_space": True} if kind[0] == "R" else {}
        post = {"type": kind, "sep": ["<|end|>", 3], "cls": ["<|bos|>", 1], **more}
        yield kind, {**whole, "post_processor": post}
        yield f"two of {kind}", {**whole, "post_processor": _sequence("processors", post, post)}
