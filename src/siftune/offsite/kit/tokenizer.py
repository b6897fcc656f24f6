"""Tokenizer files of a kit: allowed content, and loading of an untrusted tokenizer.

tokenizer.json is what the tokenizers library writes, without the padding and truncation that somebody has set.
tokenizer_config.json has the keys below and no others, so neither paths and names nor code nor other files can stand
in it. The class is always PreTrainedTokenizerFast. The chat template is Jinja, which transformers runs in a sandbox.

An untrusted tokenizer is checked in three steps: its parts, from the file alone (tokenizer_parts.py,
tokenizer_tokens.py); its use, in a resource-limited subprocess (limited.py, tokenizer_trial.py, template.py); and only
then it is built here.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siftune.base.errors import KitError
from siftune.offsite.kit.limited import Limits, run_limited
from siftune.offsite.kit.manifest import canonical
from siftune.offsite.kit.strict import as_int, as_list, as_object, as_text, brief, parse_json, shown, truth
from siftune.offsite.kit.template import TEMPLATE
from siftune.offsite.kit.tokenizer_parts import TOKENIZER, check_chains
from siftune.offsite.kit.tokenizer_tokens import check_tokens

CONFIG = "tokenizer_config.json"
FILES = (TOKENIZER, CONFIG, TEMPLATE)
CLASS = "PreTrainedTokenizerFast"
MAX_SPECIAL = 10_000  # further special tokens
# of tokenizer.json: what Python makes of a list or an item takes a hundred times its place in the file
MAX_BOXES, MAX_ITEMS = 1 << 21, 1 << 22

_LIMITS = Limits()
_tried: dict[bytes, str | None] = {}  # hash of the files of a trial that ended well -> its example

_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SWITCHES = ("clean_up_tokenization_spaces", "split_special_tokens")
_SIDES = ("padding_side", "truncation_side")
_REQUIRED = ("tokenizer_class", "model_max_length", "model_input_names", "extra_special_tokens", *_SIDES, *_SWITCHES)
_END = "eos_token"  # without one, no row can be tokenised
_PARTS = (
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"),
    *("decoder", "model"),
)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Turn a tokenizer into the files of a kit; of several chat templates the one called `default` is taken.

    Raises:
        KitError: It is none of the tokenizers library, or uses several classes of tokens that a kit does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise KitError(f"a {type(tokenizer).__name__} cannot leave; convert it to one of the tokenizers library first")
    plain = Tokenizer.from_str(backend.to_str())
    plain.no_padding()
    plain.no_truncation()
    files = {TOKENIZER: plain.to_str().encode(), CONFIG: canonical(_settings(tokenizer))}
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return files | ({TEMPLATE: template.encode()} if template else {})


def _settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    named = {name: getattr(tokenizer, name) for name in _NAMED}
    return {
        "tokenizer_class": CLASS,
        "model_max_length": int(tokenizer.model_max_length),
        "model_input_names": list(tokenizer.model_input_names),
        "extra_special_tokens": [str(token) for token in tokenizer.extra_special_tokens],
        **{name: getattr(tokenizer, name) for name in (*_SIDES, *_SWITCHES)},
        **{name: str(token) for name, token in named.items() if token is not None},
    }


def make_tokenizer(files: Mapping[str, bytes], vocabulary: int) -> PreTrainedTokenizerFast:
    """Check a kit's tokenizer files and build the tokenizer of them, from memory.

    The files are at most as large as a kit's may be; `vocabulary` tokens have embeddings in the emulator.

    Raises:
        KitError: A file is damaged, has what it must not have, a token has no embedding, or it fails, blows up or takes
            too long in use.
    """
    settings = _check_config(parse_json(files[CONFIG], CONFIG))
    _check_parts(files[TOKENIZER], vocabulary)
    try_out(files)
    with _in_words():
        backend = Tokenizer.from_str(files[TOKENIZER].decode())
    _check_numbers(settings, backend, vocabulary)
    with _in_words():
        plain = {name: value for name, value in settings.items() if name != "tokenizer_class"}
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_template(files), **plain)


def _check_parts(data: bytes, vocabulary: int) -> None:
    """Check tokenizer.json from the file alone."""
    for marks, most in (("[{", MAX_BOXES), (",", MAX_ITEMS)):
        if (count := sum(data.count(mark.encode()) for mark in marks)) > most:
            raise KitError(f"{TOKENIZER} has {count} times {' or '.join(marks)}; {most} are allowed")
    parts = as_object(parse_json(data, TOKENIZER), TOKENIZER, _PARTS)
    for name in ("truncation", "padding"):
        if parts[name] is not None:
            raise KitError(f"{TOKENIZER}: {name} is {shown(parts[name])}, not null")
    check_chains(parts)
    check_tokens(parts, vocabulary)


def try_out(files: Mapping[str, bytes], limits: Limits = _LIMITS) -> str | None:
    """Try tokenizer and chat template in a child process, which may die of them; once for the same bytes.

    The files have passed the checks of `make_tokenizer` that need no more than them.

    Returns:
        A short conversation in the chat template's form; None without a template.

    Raises:
        KitError: They fail, blow up or take too long, or the template leaves out what is said.
    """
    parts = (hashlib.sha256(files.get(name, b"")).digest() for name in FILES)
    key = hashlib.sha256(b"".join(parts)).digest()
    if key not in _tried:
        settings = parse_json(files[CONFIG], CONFIG)
        with _in_words():
            request = {
                "tokenizer": files[TOKENIZER].decode(),
                "template": _template(files),
                "named": {name: settings[name] for name in _NAMED if name in settings},
            }
        _tried[key] = run_limited("siftune.offsite.kit.tokenizer_trial", request, limits)
    return _tried[key]


def _template(files: Mapping[str, bytes]) -> str | None:
    return files[TEMPLATE].decode() if TEMPLATE in files else None


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Turn exceptions of transformers and tokenizers on untrusted values into one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise KitError(f"{TOKENIZER} is no tokenizer that can be used ({brief(error)})") from error


def _check_numbers(settings: Mapping[str, Any], backend: Tokenizer, vocabulary: int) -> None:
    """Each token needs an embedding, and special tokens a number: transformers would give them new ones."""
    past = {number: token for token, number in backend.get_vocab().items() if number >= vocabulary}
    if past:  # the library gives added tokens numbers of its own where those of the file are taken
        raise KitError(f"{TOKENIZER}: {shown(past[min(past)])} is token {min(past)} of {vocabulary} embeddings")
    for name in _NAMED:
        if name in settings and backend.token_to_id(settings[name]) is None:
            raise KitError(f"{CONFIG}: {name} is {shown(settings[name])}, which is not in {TOKENIZER}")
    for token in settings["extra_special_tokens"]:
        if backend.token_to_id(token) is None:
            raise KitError(f"{CONFIG}: extra_special_tokens has {shown(token)}, which is not in {TOKENIZER}")


def _check_config(value: Any) -> dict[str, Any]:
    as_object(value, CONFIG, (*_REQUIRED, _END), _NAMED)
    if value["tokenizer_class"] != CLASS:
        raise KitError(f"{CONFIG}: tokenizer_class is {shown(value['tokenizer_class'])}, not {CLASS}")
    as_int(value["model_max_length"], f"{CONFIG}: model_max_length", 1, 10**32)
    for name in _SIDES:
        as_text(value[name], f"{CONFIG}: {name}", "left|right")
    for name in _SWITCHES:
        truth(value[name], f"{CONFIG}: {name}")
    names = as_list(value["model_input_names"], f"{CONFIG}: model_input_names", 16)
    for item in names:
        as_text(item, f"{CONFIG}: model_input_names", "input_ids|attention_mask|token_type_ids")
    if names[:1] != ["input_ids"] or len(set(names)) < len(names):  # by the first one batches are padded
        raise KitError(f"{CONFIG}: model_input_names is {shown(names)}; it must begin with input_ids, each once")
    tokens = as_list(value["extra_special_tokens"], f"{CONFIG}: extra_special_tokens", MAX_SPECIAL)
    for token in (*tokens, *(value[name] for name in _NAMED if name in value)):
        if not isinstance(token, str) or not 1 <= len(token) <= 256:
            raise KitError(f"{CONFIG}: a special token is {shown(token)}, not a text of 1 to 256 characters")
    return value  # type: ignore[no-any-return]
