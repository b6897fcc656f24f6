"""Allowlist of the components of an untrusted tokenizer.json.

It has what the tokenizers of the supported families have, so that few lines of native code see untrusted values.
Normalizers and decoders must equal an entry, since they rewrite text. For the others, the names of the keys are
compared. Sizes, patterns and numbers show in use: see tokenizer_trial.py.
"""

from typing import Any

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import as_list, as_object, shown

TOKENIZER = "tokenizer.json"

_TOP = (
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"),
    *("decoder", "model"),
)
_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_MARK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_EXACT: dict[str, tuple[dict[str, Any], ...]] = {
    "normalizer": ({"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}, _SPACE),
    "decoder": (
        *(_MARK, {"type": "ByteFallback"}, {"type": "Fuse"}),
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ),
}
_BYTES, _SPLIT = ("add_prefix_space", "trim_offsets", "use_regex"), ("pattern", "behavior", "invert")
_META = ("replacement", "prepend_scheme", "split")
_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "normalizer": {},
    "pre_tokenizer": {
        **{"ByteLevel": _BYTES, "Metaspace": _META, "Split": _SPLIT},
        **{"Digits": ("individual_digits",), "Punctuation": ("behavior",)},
    },
    "decoder": {"ByteLevel": _BYTES, "Metaspace": _META},
    "post_processor": {"ByteLevel": _BYTES, "TemplateProcessing": ("single", "pair", "special_tokens")},
    "model": {
        "BPE": (
            *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"),
            *("ignore_merges", "vocab", "merges"),
        ),
        "Unigram": ("unk_id", "vocab", "byte_fallback"),
    },
}
_ITEMS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


def check_parts(value: Any) -> list[str]:
    """Compare a tokenizer.json, parsed, with the allowlist.

    Returns:
        The normalizers as text, in their order: they rewrite a text before it is cut into tokens.

    Raises:
        KitError: A component or key is not in the list, or the model draws tokens at random.
    """
    parts = as_object(value, TOKENIZER, _TOP)
    for name in ("truncation", "padding"):
        if parts[name] is not None:
            raise KitError(f"{TOKENIZER}: {name} is {shown(parts[name])}, not null")
    flat = {name: list(_flat(parts[name], f"{TOKENIZER}: {name}", name)) for name in _KEYS}
    if not flat["model"]:
        raise KitError(f"{TOKENIZER} has no model")
    if dropout := flat["model"][0].get("dropout"):
        raise KitError(f"{TOKENIZER}: model.dropout is {shown(dropout)}; a tokenizer must not draw at random")
    return [_as_text(part) for part in flat["normalizer"]]


def _flat(part: Any, where: str, place: str) -> list[dict[str, Any]]:
    """Check a component or a sequence of them, and list the components in their order."""
    if part is None:
        return []
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "Sequence" and place in _ITEMS:
        items = _ITEMS[place]
        as_object(part, where, ("type", items))
        parts = as_list(part[items], f"{where}.{items}", 64)
        return [leaf for number, item in enumerate(parts) for leaf in _flat(item, f"{where}.{items}.{number}", place)]
    if place == "model" and isinstance(part, dict) and kind is None and "merges" in part:
        kind = "BPE"  # files of old versions do not name it
    if part in _EXACT.get(place, ()):
        return [part]
    keys = _KEYS[place].get(kind) if isinstance(kind, str) else None
    if keys is None:
        kinds = ", ".join([*_KEYS[place], *(_as_text(entry) for entry in _EXACT.get(place, ()))])
        raise KitError(f"{where} is {shown(part)}; a kit may have {kinds}")
    as_object(part, where, (), ("type", *keys))
    return [part]


def _as_text(part: dict[str, Any]) -> str:
    values = [value.get("String") if isinstance(value, dict) else value for value in part.values()]
    return " ".join(str(value) if value == part["type"] else repr(value) for value in values)
