"""Tokenizer files of a kit: allowed content, and loading.

tokenizer.json is what the tokenizers library writes, without the padding and truncation that somebody has set.
tokenizer_config.json has the keys below and no others, so neither paths and names nor code nor other files can stand
in it. The class is always PreTrainedTokenizerFast, which renders the chat template in Jinja's sandbox.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siftune.base.errors import KitError
from siftune.offsite.kit.manifest import canonical
from siftune.offsite.kit.strict import as_object, brief, parse_json, shown

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, CONFIG, TEMPLATE)
CLASS = "PreTrainedTokenizerFast"

_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SWITCHES = ("clean_up_tokenization_spaces", "split_special_tokens")
_SIDES = ("padding_side", "truncation_side")
_REQUIRED = ("tokenizer_class", "model_max_length", "model_input_names", "extra_special_tokens", *_SIDES, *_SWITCHES)
_END = "eos_token"  # without one, no row can be tokenised


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Turn a tokenizer into the files of a kit; of several chat templates the one called `default` is taken.

    Raises:
        KitError: It is none of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise KitError(f"a {type(tokenizer).__name__} cannot be put in a kit; convert it to a fast tokenizer first")
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
    """Build the tokenizer of a kit's files, from memory; `vocabulary` tokens have embeddings in the emulator.

    Raises:
        KitError: A file is damaged, tokenizer_config.json has other keys or another class, or a token has no embedding.
    """
    settings = as_object(parse_json(files[CONFIG], CONFIG), CONFIG, (*_REQUIRED, _END), _NAMED)
    if settings["tokenizer_class"] != CLASS:
        raise KitError(f"{CONFIG}: tokenizer_class is {shown(settings['tokenizer_class'])}, not {CLASS}")
    plain = {name: value for name, value in settings.items() if name != "tokenizer_class"}
    try:
        backend = Tokenizer.from_str(files[TOKENIZER].decode())
        template = files[TEMPLATE].decode() if TEMPLATE in files else None
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **plain)
        vocab = tokenizer.get_vocab()
    except Exception as error:  # transformers and tokenizers run on untrusted values
        raise KitError(f"no tokenizer can be made of {', '.join(files)} ({brief(error)})") from error
    token, number = max(vocab.items(), key=lambda item: item[1], default=("", -1))
    if number >= vocabulary:
        raise KitError(f"{TOKENIZER}: {shown(token)} is token {number} of {vocabulary} embeddings")
    return tokenizer
