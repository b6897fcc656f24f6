"""Check the tokens of an untrusted tokenizer.json, and that each token number has an embedding.

A number past the embeddings fails in the middle of training, on the first row that has it. It can stand in three
places: in the model's vocabulary, among the added tokens, and in the templates that post-processors put around a text.
Bounds are ours; Gemma 3 has 262,144 tokens and 514,906 merges, and no token that we know has 1,024 characters.
"""

from collections.abc import Mapping
from typing import Any

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import Check, as_int, as_list, as_map, as_object, null_or, shown, truth
from siftune.offsite.kit.tokenizer_parts import TOKENIZER, Part, Room, check_fields, leaves, text

MAX_TOKEN = 1024  # characters of a token
MAX_AFFIX = 16  # characters of what marks a token that continues or ends a word
MAX_ADDED = 1 << 16  # added tokens
MAX_MERGES = 1 << 21
MAX_AROUND = 16  # pieces of a template, special tokens for it, and token numbers of one of these

_token = text(1, MAX_TOKEN)


def check_tokens(whole: Mapping[str, Any], vocabulary: int) -> None:
    """Check vocabulary, merges, added tokens and post-processors of tokenizer.json against the number of embeddings.

    Raises:
        KitError: There are too many of something, or a number is none of the embeddings'.
    """
    numbered = _of_embeddings(vocabulary)
    _check_model(whole["model"], numbered, vocabulary)
    _check_added(whole["added_tokens"], numbered)
    posts = Room("processors", _posts(numbered))
    leaves(whole["post_processor"], f"{TOKENIZER}: post_processor", posts)


def _of_embeddings(vocabulary: int) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not int or not 0 <= value < vocabulary:
            raise KitError(f"{where} is {shown(value)}, which is not the number of one of the {vocabulary} embeddings")

    return check


def _check_added(value: Any, numbered: Check) -> None:
    where = f"{TOKENIZER}: added_tokens"
    fields = {"id": numbered, "content": _token}
    fields |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), truth)
    for place, token in enumerate(as_list(value, where, MAX_ADDED)):
        as_object(token, f"{where}.{place}", tuple(fields))
        for name, check in fields.items():
            check(token[name], f"{where}.{place}.{name}")


def _check_model(value: Any, numbered: Check, vocabulary: int) -> None:
    where = f"{TOKENIZER}: model"
    kinds = _models(numbered, vocabulary)
    # files of old say only by their keys that they are BPE
    kind = value.get("type", "BPE" if "merges" in value else None) if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise KitError(f"{where} is {shown(kind or value)}; a kit may have {', '.join(kinds)}")
    if "vocab" not in value:
        raise KitError(f"{where} has no vocab")
    check_fields({"type": kind, **value}, where, kinds[kind])


def _models(numbered: Check, vocabulary: int) -> dict[str, dict[str, Check]]:
    def few(value: Any, where: str) -> None:
        if isinstance(value, dict | list) and len(value) > vocabulary:
            raise KitError(f"{where} has {len(value)} tokens, but there are {vocabulary} embeddings")

    def vocab(value: Any, where: str) -> None:
        few(value, where)
        for token, place in as_map(value, where, vocabulary).items():
            if type(place) is not int or not 0 <= place < vocabulary:
                numbered(place, f"{where}: {shown(token)}")
            if len(token) > MAX_TOKEN:
                raise KitError(f"{where} has a token of {len(token)} characters; it may have {MAX_TOKEN}")

    def scored(value: Any, where: str) -> None:
        few(value, where)
        for place, entry in enumerate(as_list(value, where, vocabulary)):
            if len(as_list(entry, f"{where}.{place}", 2)) != 2 or not isinstance(entry[1], int | float):
                raise KitError(f"{where}.{place} is {shown(entry)}, not a token and its score")
            text(0, MAX_TOKEN)(entry[0], f"{where}.{place}")

    unknown, affix = null_or(text(0, MAX_TOKEN)), null_or(text(0, MAX_AFFIX))
    return {
        "BPE": {
            **{"vocab": vocab, "merges": _merges, "dropout": _no_dropout, "unk_token": unknown},
            **{"continuing_subword_prefix": affix, "end_of_word_suffix": affix},
            **{"fuse_unk": truth, "byte_fallback": truth, "ignore_merges": truth},
        },
        "Unigram": {"vocab": scored, "unk_id": null_or(numbered), "byte_fallback": truth},
        "WordLevel": {"vocab": vocab, "unk_token": unknown},
    }


def _merges(value: Any, where: str) -> None:
    """Either form that the library writes; that their tokens are in the vocabulary it sees for itself."""
    for place, merge in enumerate(as_list(value, where, MAX_MERGES)):
        if not isinstance(merge, str) and not (isinstance(merge, list) and len(merge) == 2):
            raise KitError(f"{where}.{place} is {shown(merge)}, not two tokens")


def _no_dropout(value: Any, where: str) -> None:
    if value is not None and value != 0:
        raise KitError(f"{where} is {shown(value)}; a tokenizer that draws by chance is not allowed")


def _posts(numbered: Check) -> dict[str, Part]:
    def named(value: Any, where: str) -> None:
        if len(as_list(value, where, 2)) != 2:
            raise KitError(f"{where} is {shown(value)}, not a token and its number")
        _token(value[0], where)
        numbered(value[1], where)

    def specials(value: Any, where: str) -> None:
        if value == {}:
            return
        for name, entry in as_map(value, where, MAX_AROUND).items():
            as_object(entry, f"{where}.{shown(name)}", ("id", "ids", "tokens"))
            for place in as_list(entry["ids"], f"{where}.{shown(name)}.ids", MAX_AROUND):
                numbered(place, f"{where}.{shown(name)}.ids")
            for token in as_list(entry["tokens"], f"{where}.{shown(name)}.tokens", MAX_AROUND):
                _token(token, f"{where}.{shown(name)}.tokens")

    switches: dict[str, Check] = {"trim_offsets": truth, "add_prefix_space": truth}
    ends: dict[str, Check] = {"sep": named, "cls": named}
    template: dict[str, Check] = {"special_tokens": specials, "single": _template, "pair": _template}
    return {
        "ByteLevel": Part({**switches, "use_regex": truth}),
        "RobertaProcessing": Part({**ends, **switches}),
        "BertProcessing": Part(ends),
        "TemplateProcessing": Part(template),
    }


def _template(value: Any, where: str) -> None:
    """Pieces of a template: each of the two texts at most once, since a text that stands twice has twice its tokens."""
    texts = []
    for place, piece in enumerate(as_list(value, where, MAX_AROUND)):
        as_object(piece, f"{where}.{place}", (), ("Sequence", "SpecialToken"))
        for kind, entry in piece.items():
            as_object(entry, f"{where}.{place}.{kind}", ("id", "type_id"))
            as_int(entry["type_id"], f"{where}.{place}.{kind}.type_id", 0, 255)
            texts += [entry["id"]] if kind == "Sequence" else []
    if any(texts.count(name) > 1 for name in ("A", "B")):
        raise KitError(f"{where} has a text twice")
