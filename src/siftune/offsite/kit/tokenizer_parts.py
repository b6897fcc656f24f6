"""Check the parts of an untrusted tokenizer.json before any of them is built or run.

Components and their fields come from the tables below and from nowhere else. Each has a growth: a text of n bytes
becomes at most a·n + b bytes. Growths of a chain multiply, so the file alone gives that of the complete chain:
36 times "a" -> "aa" is 2^36 before it has run. Every bound is ours; real tokenizers stay far below (Llama 2: 12,
GPT-2: 2, Qwen2: 6). What is slow, or fails, within the bounds shows in tokenizer_trial.py; token numbers are checked in
tokenizer_tokens.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import Check, as_list, as_object, null_or, one_of, shown, truth, whole

TOKENIZER = "tokenizer.json"
MAX_PIECES = 16  # normalizers, pre-tokenizers, post-processors or decoders in one chain
MAX_DEPTH = 3  # sequences within sequences
MAX_GROWTH = 200  # bytes that one byte of text may become in a chain
MAX_PATTERN = 2000  # characters of a pattern
MAX_CONTENT = 64  # characters of what is put in a pattern's place, or before a text
MAX_STRIPPED = 1024  # characters that a decoder takes off a token


class Growth(NamedTuple):
    """A text of n bytes becomes at most `factor`·n + `more` bytes."""

    factor: float = 1
    more: float = 0

    def then(self, other: "Growth") -> "Growth":
        """The growth of one after the other."""
        return Growth(self.factor * other.factor, self.more * other.factor + other.more)


@dataclass(frozen=True)
class Part:
    """A component: its fields, any of which may be missing, and how a text can grow in it."""

    fields: Mapping[str, Check] = field(default_factory=dict)
    growth: Callable[[Mapping[str, Any]], Growth] = lambda part: Growth()


@dataclass(frozen=True)
class Room:
    """The components that one place of tokenizer.json may hold."""

    inner: str  # key of the list in a `Sequence`
    parts: Mapping[str, Part]  # type -> component


def text(least: int, most: int) -> Check:
    """A text of at most N characters."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or not least <= len(value) <= most:
            fault = f"has {len(value)} characters" if isinstance(value, str) else f"is {shown(value)}"
            raise KitError(f"{where} {fault}; it must be a text of {least} to {most}")

    return check


def _pattern(value: Any, where: str) -> None:
    as_object(value, where, (), ("String", "Regex"))
    if len(value) != 1:
        raise KitError(f"{where} must be either a String or a Regex")
    for kind, content in value.items():
        text(1, MAX_PATTERN)(content, f"{where}.{kind}")


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _by(factor: float) -> Callable[[Mapping[str, Any]], Growth]:
    return lambda part: Growth(factor)


def _replaced(part: Mapping[str, Any]) -> Growth:
    """A regular expression can match nothing at all, before every character and at the end."""
    pattern, content = part.get("pattern", {}), _size(part.get("content", ""))
    if "Regex" in pattern:
        return Growth(1 + content, content)
    return Growth(max(1, content / _size(pattern.get("String", "?"))))


def _in_bytes(part: Mapping[str, Any]) -> Growth:
    """A byte is written as a character of at most two, and before each piece comes a space, if any does."""
    return Growth(4 if part.get("add_prefix_space", True) else 2)


def _metaspace(part: Mapping[str, Any]) -> Growth:
    """A space becomes the replacement, and each piece may get one more before it."""
    return Growth(2 * _size(part.get("replacement", "▁")))


_BYTES = {"add_prefix_space": truth, "trim_offsets": truth, "use_regex": truth}
_BEHAVIOR = {"behavior": one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")}
_REPLACE = Part({"pattern": _pattern, "content": text(0, MAX_CONTENT)}, _replaced)
_META = {
    **{"replacement": text(1, 1), "str_rep": text(1, 1), "add_prefix_space": truth, "split": truth},
    "prepend_scheme": one_of("first", "never", "always"),
}
_BERT = dict.fromkeys(("clean_text", "handle_chinese_chars", "lowercase"), truth)

# growths of the normal forms are those of Unicode in UTF-8: U+1D1C0, U+0DDD and U+FDFA grow the most
NORMALIZERS = Room(
    "normalizers",
    {
        "NFC": Part(growth=_by(3)),
        "NFD": Part(growth=_by(3)),
        "NFKC": Part(growth=_by(11)),
        "NFKD": Part(growth=_by(11)),
        "Nmt": Part(),
        "Lowercase": Part(growth=_by(1.5)),
        "Strip": Part({"strip_left": truth, "strip_right": truth}),
        "StripAccents": Part(),
        "Replace": _REPLACE,
        "Prepend": Part({"prepend": text(0, MAX_CONTENT)}, lambda part: Growth(1, _size(part.get("prepend", "")))),
        "ByteLevel": Part(growth=_by(2)),
        # spaces around a character of three bytes, then NFD, then lower case
        "BertNormalizer": Part({**_BERT, "strip_accents": null_or(truth)}, _by(5 / 3 * 3 * 1.5)),
    },
)
PRE_TOKENIZERS = Room(
    "pretokenizers",
    {
        "ByteLevel": Part(_BYTES, _in_bytes),
        "Metaspace": Part(_META, _metaspace),
        "Split": Part({"pattern": _pattern, **_BEHAVIOR, "invert": truth}),
        "Digits": Part({"individual_digits": truth}),
        "Punctuation": Part(_BEHAVIOR),
        "Whitespace": Part(),
        "WhitespaceSplit": Part(),
        "BertPreTokenizer": Part(),
        "CharDelimiterSplit": Part({"delimiter": text(1, 1)}),
        "UnicodeScripts": Part(),
        "FixedLength": Part({"length": whole(1, 1 << 20)}),
    },
)
DECODERS = Room(
    "decoders",
    {
        "ByteLevel": Part(_BYTES, _by(3)),  # a byte that is no text becomes U+FFFD
        "Metaspace": Part(_META),
        "Replace": _REPLACE,
        "ByteFallback": Part(),
        "Fuse": Part(),
        # from one end only: a token that is shorter than what both ends take makes the library panic
        "Strip": Part({"content": text(1, 1), "start": whole(0, MAX_STRIPPED), "stop": whole(0, 0)}),
    },
)

# component -> why it is none of the above, where that needs saying
_WHY = {"Precompiled": ", a table of bytes that the tokenizers library follows without checking it"}


def check_chains(whole: Mapping[str, Any]) -> None:
    """Check how a text is changed on its way into tokens, and tokens on their way back, by tokenizer.json, parsed.

    Raises:
        KitError: A component or field is not in the tables, there are too many of them, or a text could outgrow itself.
    """
    written = [leaf for name, room in _WRITING.items() for leaf in leaves(whole[name], f"{TOKENIZER}: {name}", room)]
    _check_growth(written, "normalizer and pre_tokenizer")
    _check_growth(leaves(whole["decoder"], f"{TOKENIZER}: decoder", DECODERS), "decoder")


_WRITING = {"normalizer": NORMALIZERS, "pre_tokenizer": PRE_TOKENIZERS}


def leaves(value: Any, where: str, room: Room) -> list[tuple[Part, dict[str, Any]]]:
    """Check a component, or a sequence of them, against a room's table.

    Returns:
        The component's entry in the table and what the file says of it, in the order in which they are run.
    """
    found = _leaves(value, where, room, MAX_DEPTH)
    if len(found) > MAX_PIECES:
        raise KitError(f"{where} is made of {len(found)} components; it may be made of {MAX_PIECES}")
    return found


def _leaves(value: Any, where: str, room: Room, depth: int) -> list[tuple[Part, dict[str, Any]]]:
    if value is None:
        return []
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "Sequence":
        as_object(value, where, ("type", room.inner))
        if not depth:
            raise KitError(f"{where} has sequences within sequences, more than {MAX_DEPTH} deep")
        items = enumerate(as_list(value[room.inner], f"{where}.{room.inner}", MAX_PIECES))
        inside = [_leaves(item, f"{where}.{room.inner}.{place}", room, depth - 1) for place, item in items]
        return [leaf for found in inside for leaf in found]
    if not isinstance(kind, str) or kind not in room.parts:
        known = ", ".join(room.parts)
        raise KitError(f"{where} is {shown(kind or value)}{_WHY.get(str(kind), '')}; a kit may have {known}")
    part = room.parts[kind]
    check_fields(value, where, part.fields)
    return [(part, value)]


def check_fields(value: dict[str, Any], where: str, fields: Mapping[str, Check]) -> None:
    """Check each field of a component, which beside its type may have these."""
    as_object(value, where, ("type",), tuple(fields))
    for name, content in value.items():
        if name != "type":
            fields[name](content, f"{where}.{name}")


def _check_growth(chain: list[tuple[Part, dict[str, Any]]], name: str) -> None:
    whole = Growth()
    for part, value in chain:
        whole = whole.then(part.growth(value))
    if whole.factor + whole.more > MAX_GROWTH:
        raise KitError(
            f"{TOKENIZER}: {name} can turn one byte of text into {whole.factor + whole.more:.3g}; "
            f"more than {MAX_GROWTH} are not allowed"
        )
