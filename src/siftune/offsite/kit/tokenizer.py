"""The tokenizer files of a kit: what of a tokenizer may leave, and how a stranger's is loaded.

tokenizer.json is what the tokenizers library writes, without the padding and truncation that somebody has set.
tokenizer_config.json has the keys below and no others, so neither paths and names nor code nor other files can stand
in it. The class is always PreTrainedTokenizerFast. The chat template is Jinja, which transformers runs in a sandbox.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siftune.errors import KitError
from siftune.offsite.kit.manifest import canonical
from siftune.offsite.kit.strict import as_int, as_list, as_object, as_text, brief, parse_json, shown

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = (TOKENIZER, CONFIG, TEMPLATE)
CLASS = "PreTrainedTokenizerFast"
MAX_SPECIAL = 10_000  # further special tokens
_TRIAL = "a b, Ü 東\n1"  # some defects show only in use

_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SWITCHES = ("clean_up_tokenization_spaces", "split_special_tokens")
_SIDES = ("padding_side", "truncation_side")
_REQUIRED = ("tokenizer_class", "model_max_length", "model_input_names", "extra_special_tokens", *_SIDES, *_SWITCHES)
_PARTS = (
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"),
    *("decoder", "model"),
)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Turn a tokenizer into the files of a kit.

    Args:
        tokenizer: A tokenizer of the tokenizers library. Of several chat templates the one called `default` is taken.

    Returns:
        File name -> content.

    Raises:
        KitError: It is no such tokenizer, or one that uses several classes of tokens that a kit does not know.
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

    Args:
        files: File name -> content, at most as large as a kit's may be.
        vocabulary: Tokens that the emulator has embeddings for.

    Raises:
        KitError: A file is damaged, has keys that it must not have, or a special token is none of the vocabulary.
    """
    settings = _check_config(parse_json(files[CONFIG], CONFIG))
    parts = as_object(parse_json(files[TOKENIZER], TOKENIZER), TOKENIZER, _PARTS)
    for name in ("truncation", "padding"):
        if parts[name] is not None:
            raise KitError(f"{TOKENIZER}: {name} is {shown(parts[name])}, not null")
    with _in_words():
        backend = Tokenizer.from_str(files[TOKENIZER].decode())
    _check_special(settings, backend, vocabulary)
    with _in_words():
        template = files[TEMPLATE].decode() if TEMPLATE in files else None
        plain = {name: value for name, value in settings.items() if name != "tokenizer_class"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **plain)
        tokenizer.decode(tokenizer.encode(_TRIAL))
    return tokenizer


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Turn what transformers and tokenizers throw at a stranger's values into a sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise KitError(f"{TOKENIZER} is no tokenizer that can be used ({brief(error)})") from error


def _check_special(settings: Mapping[str, Any], backend: Tokenizer, vocabulary: int) -> None:
    """Special tokens must be in the vocabulary: transformers would add them, past the end of the embeddings."""
    for name in _NAMED:
        if name in settings:
            number = backend.token_to_id(settings[name])
            if number is None or number >= vocabulary:
                fault = "not in tokenizer.json" if number is None else f"number {number} of {vocabulary} embeddings"
                raise KitError(f"{CONFIG}: {name} is {shown(settings[name])}, which is {fault}")
    for token in settings["extra_special_tokens"]:
        if backend.token_to_id(token) is None:
            raise KitError(f"{CONFIG}: extra_special_tokens has {shown(token)}, which is not in tokenizer.json")


def _check_config(value: Any) -> dict[str, Any]:
    as_object(value, CONFIG, _REQUIRED, _NAMED)
    if value["tokenizer_class"] != CLASS:
        raise KitError(f"{CONFIG}: tokenizer_class is {shown(value['tokenizer_class'])}, not {CLASS}")
    as_int(value["model_max_length"], f"{CONFIG}: model_max_length", 1, 10**32)
    for name in _SIDES:
        as_text(value[name], f"{CONFIG}: {name}", "left|right")
    for name in _SWITCHES:
        if not isinstance(value[name], bool):
            raise KitError(f"{CONFIG}: {name} is {shown(value[name])}, not true or false")
    for item in as_list(value["model_input_names"], f"{CONFIG}: model_input_names", 16):
        as_text(item, f"{CONFIG}: model_input_names", "input_ids|attention_mask|token_type_ids")
    tokens = as_list(value["extra_special_tokens"], f"{CONFIG}: extra_special_tokens", MAX_SPECIAL)
    for token in (*tokens, *(value[name] for name in _NAMED if name in value)):
        if not isinstance(token, str) or not 1 <= len(token) <= 256:
            raise KitError(f"{CONFIG}: a special token is {shown(token)}, not a text of 1 to 256 characters")
    return value  # type: ignore[no-any-return]
