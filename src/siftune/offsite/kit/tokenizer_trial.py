"""Try an untrusted tokenizer and chat template on texts of many kinds, so that failures of training occur here.

This runs in a child with limits, see limited.py, and imports neither torch nor transformers. Among the texts are the
letters that the tokenizer's own patterns name: an attack may wait for one of them.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from siftune.base.errors import KitError
from siftune.offsite.kit.limited import limit_memory
from siftune.offsite.kit.strict import brief, shown
from siftune.offsite.kit.template import try_template
from siftune.offsite.kit.tokenizer_parts import MAX_GROWTH, TOKENIZER

_FOR_TEMPLATES = 256  # 10^6 bytes; a template needs less than a tokenizer
_DEPTH = 600  # calls within calls in a template: a thousand are all there are where it is used, some of them taken
_LONG = 4096  # characters of a long text
_NAMED = 1024  # letters of patterns that are tried
_SCRIPTS = (
    "a b, Ü 東\n1",
    "".join(map(chr, range(1, 0x180))),
    "Ελληνικά Русский עברית العربية हिन्दी ไทย ქართული 中文 日本語 한국어 አማርኛ",
    "naïve e\u0301 \ufdfa \U0001d1c0 ½ ① ﬁ İ ß \u200d\u200b\ufeff\ue000\U0010ffff 👩\u200d💻 \x00",
    "{'key': [1.5e-3, \"x\"]}\r\n\tdef f(x):\n        return x**2  # https://example.org/?q=%20",
    "",
)


def answer(request: dict[str, Any]) -> str | None:
    """Try both: `tokenizer`, the text of tokenizer.json, and `template`, that of chat_template.jinja or None.

    `named` are special tokens by name. The answer is a short conversation in the template's form; None without one.

    Raises:
        KitError: One of them fails.
    """
    source = request["tokenizer"]
    backend = _use("it is built", Tokenizer.from_str, source)
    counts = {text: _try_text(backend, text) for text in (*_SCRIPTS, *_long(), *_texts_of(json.loads(source)))}
    if lost := [text for text in _SCRIPTS if text and not counts[text]]:
        raise KitError(f"{TOKENIZER} makes no token of {shown(lost[0])}")
    _use("all tokens are decoded", backend.decode, list(range(backend.get_vocab_size())))
    if request["template"] is None:
        return None
    limit_memory(_FOR_TEMPLATES)
    sys.setrecursionlimit(_DEPTH)
    example = try_template(request["template"], request["named"])
    _try_text(backend, example)
    return example


def _try_text(backend: Tokenizer, text: str) -> int:
    """Tokenise a text and go back; return how many tokens it has without special ones."""
    counts = []
    what = f"a text of {len(text)} characters is tokenised, which begins with {text[:16]!a}"
    for special in (False, True):
        ids = _use(what, backend.encode, text, add_special_tokens=special).ids
        if len(ids) > MAX_GROWTH * (len(text.encode()) + _LONG):
            raise KitError(f"{TOKENIZER} makes {len(ids)} tokens of a text of {len(text)} characters")
        _use(what.replace("tokenised", "decoded"), backend.decode, ids, skip_special_tokens=special)
        counts.append(len(ids))
    return counts[0]


def _use(what: str, function: Any, *args: Any, **options: Any) -> Any:
    """Call the library, and turn its exceptions on untrusted values into one sentence."""
    try:
        return function(*args, **options)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        said = brief(error)
        raise KitError(f"{TOKENIZER} is no tokenizer that can be used: it fails when {what} ({said})") from error


def _long() -> Iterator[str]:
    """Runs of one kind and a character of another, where patterns that look back take ever longer."""
    for run in ("a", " ", "1", "\n", "東", "aB", "a ", "-", "é", " \t", "a1"):
        yield (run * _LONG)[:_LONG] + "!"


def _texts_of(parts: dict[str, Any]) -> Iterator[str]:
    """Texts of what the tokenizer's own patterns name: the patterns themselves, and runs of each of their letters."""
    named = "".join(_strings([parts[name] for name in ("normalizer", "pre_tokenizer", "decoder")]))
    yield named[:_LONG]
    for letter in list(dict.fromkeys(named))[:_NAMED]:
        yield letter * 64 + "!" + letter


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(child)
