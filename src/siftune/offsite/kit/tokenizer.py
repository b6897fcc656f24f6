"""Tokenizer files of a kit: allowed content, and loading of an untrusted tokenizer.

tokenizer.json is what the tokenizers library writes, without the padding and truncation that somebody has set.
tokenizer_config.json has the keys below and no others, so neither paths and names nor code nor other files can stand
in it. The class is always PreTrainedTokenizerFast. The chat template is Jinja.

An untrusted tokenizer is used in a resource-limited subprocess (limited.py, tokenizer_trial.py, template.py) before it
is built here. The same subprocess renders the rows, and tokenises each text first, so that what passes in `siftune
verify` and what runs in `siftune train` cannot differ.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siftune.base.errors import DataError, KitError
from siftune.offsite.kit.limited import Child, ChildError, Limits
from siftune.offsite.kit.manifest import canonical
from siftune.offsite.kit.strict import as_int, as_list, as_object, as_text, brief, parse_json, shown, truth
from siftune.offsite.kit.template import TEMPLATE, ChatTemplate
from siftune.offsite.kit.tokenizer_parts import TOKENIZER

CONFIG = "tokenizer_config.json"
FILES = (TOKENIZER, CONFIG, TEMPLATE)
CLASS = "PreTrainedTokenizerFast"
MAX_SPECIAL = 10_000  # further special tokens

_BATCH = 1 << 20  # characters of the texts in a request
_CHARACTERS_PER_S = 1e5  # least speed of tokenisation; SmolLM2's is ten times faster on a slow core

_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SWITCHES = ("clean_up_tokenization_spaces", "split_special_tokens")
_SIDES = ("padding_side", "truncation_side")
_REQUIRED = ("tokenizer_class", "model_max_length", "model_input_names", "extra_special_tokens", *_SIDES, *_SWITCHES)
_END = "eos_token"  # without one, no row can be tokenised


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Turn a tokenizer into the files of a kit; of several chat templates the one called `default` is taken.

    Raises:
        KitError: It is none of the tokenizers library, or uses several classes of tokens that a kit does not know.
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


class KitTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """The tokenizer of a kit: a limited child calls its chat template, and tokenises each text first.

    Attributes:
        normalizers: Normalizers of tokenizer.json as text.
        chats: The chat template; None without one.
        child: The child.
    """

    normalizers: list[str]
    chats: ChatTemplate | None
    child: Child

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        """As for transformers' tokenizers; texts are tokenised in the child first.

        Raises:
            DataError: The tokens of a text are those of another text, or the tokenizer fails on it.
            KitError: The tokenizer exceeds a limit.
        """
        self.compare([text] if isinstance(text, str) else text or [])
        return super().__call__(text, *args, **options)

    def compare(self, texts: Sequence[str]) -> None:
        """Compare texts with the texts of their tokens, as `__call__`."""
        batch: list[str] = []
        size = 0
        for number, text in enumerate(texts, 1):
            batch.append(text)
            size += len(text)
            if number == len(texts) or size > _BATCH:
                limits = Limits(1024, 1 + size / _CHARACTERS_PER_S, 10 + 10 * size / _CHARACTERS_PER_S)
                try:
                    faults = self.child.ask({"encode": batch}, limits)
                except ChildError as error:
                    raise KitError(f"{TOKENIZER}: {error}") from error
                for fault in filter(None, faults):
                    raise DataError(fault)
                batch, size = [], 0

    def apply_chat_template(
        self, conversation: Any, *, add_generation_prompt: bool = False, tokenize: bool = True, **options: Any
    ) -> Any:
        """As for transformers' tokenizers, by `ChatTemplate.write`; `options` are those of `__call__`."""
        if self.chats is None:
            raise KitError("the kit has no chat template")
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        texts = self.chats.write([conversation] if single else conversation, add_generation_prompt)
        text = texts[0] if single else texts
        return self(text, add_special_tokens=False, **options) if tokenize else text

    def save_pretrained(self, *args: Any, **options: Any) -> tuple[str, ...]:
        """Save an ordinary tokenizer, whose files name no class of siftune."""
        plain = copy.copy(self)
        plain.__class__ = PreTrainedTokenizerFast
        saved: tuple[str, ...] = plain.save_pretrained(*args, **options)
        return saved


def make_tokenizer(files: Mapping[str, bytes], vocabulary: int) -> KitTokenizer:
    """Check a kit's tokenizer files and build the tokenizer of them, from memory.

    The files are at most as large as a kit's may be; `vocabulary` tokens have embeddings in the emulator.

    Raises:
        KitError: A file is damaged, has parts that are not allowed, a token has no embedding, tokens are not those of
            the text, or tokenizer or template fail or exceed a limit.
    """
    settings = _check_config(parse_json(files[CONFIG], CONFIG))
    with _as_kit_error():
        source, template = files[TOKENIZER].decode(), files[TEMPLATE].decode() if TEMPLATE in files else None
    child, normalizers, chats = _tried(source, template, canonical(settings), vocabulary)
    with _as_kit_error():
        backend = Tokenizer.from_str(source)
        plain = {name: value for name, value in settings.items() if name != "tokenizer_class"}
        tokenizer = KitTokenizer(tokenizer_object=backend, chat_template=template, **plain)
    tokenizer.child, tokenizer.normalizers, tokenizer.chats = child, normalizers, chats
    return tokenizer


@lru_cache(maxsize=1)
def _tried(
    source: str, template: str | None, settings: bytes, vocabulary: int
) -> tuple[Child, list[str], ChatTemplate | None]:
    """Try tokenizer and template in a child, which stays for the rows; once for the same files."""
    plain = json.loads(settings)
    special = {name: plain[name] for name in _NAMED if name in plain}
    setup = {
        **{"tokenizer": source, "template": template, "special": special, "vocabulary": vocabulary},
        **{"extra": plain["extra_special_tokens"], "split_special_tokens": plain["split_special_tokens"]},
    }
    child = Child("siftune.offsite.kit.tokenizer_trial", setup)
    try:
        normalizers = child.start()
    except ChildError as error:
        raise KitError(f"{TOKENIZER}: {error}") from error
    chats = None if template is None else ChatTemplate(child)
    for fault in filter(None, child.ask({"encode": [text for _, _, text in chats.fixed] if chats else []}, Limits())):
        raise KitError(f"text of {TEMPLATE} around messages: {fault}")
    return child, normalizers, chats


@contextlib.contextmanager
def _as_kit_error() -> Iterator[None]:
    """Turn exceptions of transformers and tokenizers on untrusted values into one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise KitError(f"{TOKENIZER} cannot be used ({brief(error)})") from error


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
