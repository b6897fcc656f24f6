"""Use of an untrusted tokenizer and chat template, in a child with limits (see limited.py).

The same functions serve the trial in `siftune verify` and the rows of `siftune train`, so neither file can tell the two
apart. This module imports neither torch nor transformers.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import brief, parse_json, shown
from siftune.offsite.kit.template import Renderer
from siftune.offsite.kit.tokenizer_parts import TOKENIZER, check_parts

_TRIAL = (
    "Spiders have eight legs, and ants have six. The teacher asked: “How many legs do they have together?” "
    "It isn't hard to count them; we'll need a moment, though, and they did not say how many are there.",
    "Question: Which of these is NOT a source of light?\n\nA) the sun\nB) the moon\nC) a lamp\n\nAnswer: B) a moon.\n",
    "You are a helpful AI assistant. Write a short story about a dog who can't find his way home.\n"
    "Once upon a time, there was a dog named Max who did not know how to get back to the house of the old man by the "
    "sea. He wasn't sure what to do.",
    "In 2019, 1,234.5 km/h was (roughly) 767 mph; 3 + 4 = 7, 50 % of $20.00 is $10.  Two  spaces,\ttabs\r\nand lines.",
    "a b, Ü 東\n1",
    "".join(map(chr, range(0x20, 0x180))),  # SmolLM2 has no tokens for some of the characters below
    "Ελληνικά Русский עברית العربية हिन्दी ไทย ქართული 中文 日本語 한국어 አማርኛ",
    "naïve e\u0301 \ufdfa \U0001d1c0 ½ ① ﬁ İ ß \u200d\u200b\ufeff\ue000\U0010ffff 👩\u200d💻",
    "{'key': [1.5e-3, \"x\"]}\r\n\tdef f(x):\n        return x**2  # https://example.org/?q=%20",
)

_texts: "_Texts"
_setup: dict[str, Any]
_renderer: Renderer | None = None


def answer(request: dict[str, Any]) -> Any:
    """Answer a request of the parent.

    The first one has `tokenizer` and `template` (the texts of the files), `special` (special tokens by name), `extra`
    (others), `split_special_tokens`, and `vocabulary` (number of embeddings). Its answer is the list of normalizers.
    The others have one key: `encode` with texts, or `render` with conversations.

    Raises:
        KitError: The tokenizer or the template cannot be used.
    """
    global _texts, _setup, _renderer
    if "encode" in request:
        return [_texts.fault(text) for text in request["encode"]]
    if "render" in request:
        _renderer = _renderer or Renderer(_setup["template"], _setup["special"])
        return [_renderer.render(chat, opened) for chat, opened in request["render"]]
    _setup, _texts = request, _Texts(request)
    for text in _TRIAL:
        if fault := _texts.fault(text):
            raise KitError(fault)
    _use("all tokens are decoded", _texts.backend.decode, list(range(request["vocabulary"])))
    return _texts.normalizers


class _Texts:
    """A tokenizer, and the comparison of a text with what its tokens say."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        source = request["tokenizer"]
        parts = parse_json(source.encode(), TOKENIZER)
        self.normalizers = check_parts(parts)
        self.backend = _use("it is built", Tokenizer.from_str, source)
        self.backend.encode_special_tokens = request["split_special_tokens"]
        self._check_numbers(request["vocabulary"])
        added = {token.content: number for number, token in self.backend.get_added_tokens_decoder().items()}
        special = {*request["special"].values(), *request["extra"]}
        for token in special:
            if token not in added:
                raise KitError(f"tokenizer_config.json has the special token {shown(token)}; {TOKENIZER} has none")
        marked = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        self._special = {added[token]: token for token in special | marked}
        self._added = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
        self._check_around()

    def _check_numbers(self, vocabulary: int) -> None:
        """Each token has a number of its own and an embedding; a number without one would fail during training."""
        numbers = self.backend.get_vocab(with_added_tokens=True)
        for token, number in numbers.items():
            if number >= vocabulary:
                raise KitError(f"{TOKENIZER}: {shown(token)} is token {number} of {vocabulary} embeddings")
            if self.backend.id_to_token(number) != token:
                other = self.backend.id_to_token(number)
                raise KitError(f"{TOKENIZER}: {shown(token)} and {shown(other)} are both token {number}")

    def _check_around(self) -> None:
        """Around a text, only one special token may stand on either side."""
        plain = self._ids("a", special=False)
        ids = self._ids("a", special=True)
        at = next((place for place in range(len(ids)) if ids[place : place + len(plain)] == plain), len(ids))
        around = [*ids[:at], *ids[at + len(plain) :]]
        if at > 1 or len(ids) - at - len(plain) not in (0, 1) or not set(around) <= self._special.keys():
            raise KitError(
                f"{TOKENIZER} puts tokens around a text: {shown(ids)}; one special token may be on each side"
            )

    def _ids(self, text: str, special: bool) -> list[int]:
        what = f"a text of {len(text)} characters is tokenised, which begins with {text[:16]!a}"
        encoding = _use(what, self.backend.encode, text, add_special_tokens=special)
        return encoding.ids  # type: ignore[no-any-return]

    def fault(self, text: str) -> str | None:
        """Compare a text with the text of its tokens; None if they agree."""
        try:
            ids = self._ids(text, special=False)
            again = _use("tokens are decoded", self.backend.decode, ids, skip_special_tokens=False)
        except KitError as error:
            return str(error)
        if not self._agree(text, again):
            at = next(
                (i for i, (a, b) in enumerate(zip(text, again, strict=False)) if a != b), min(map(len, (text, again)))
            )
            part = slice(max(at - 20, 0), at + 20)
            return f"{TOKENIZER} changes a text: {again[part]!a} for {text[part]!a}"
        if len(ids) > 2 * len(text.encode()) + 16:
            return f"{TOKENIZER} makes {len(ids)} tokens of {len(text)} characters"
        for number in self._special.keys() & set(ids):
            if self._special[number] not in text:
                return f"{TOKENIZER} makes the special token {shown(self._special[number])} of a text without it"
        return None

    def _agree(self, text: str, again: str) -> bool:
        """Compare exactly, but for Unicode's form NFC, and a space at the start or after an added token.

        Tokenizers with a mark for spaces, such as Llama 2's, put one there or take it off.
        """
        texts = [text, unicodedata.normalize("NFC", text)] if "NFC" in self.normalizers else [text]
        if again in texts:
            return True
        parts, *others = ([*re.split(f"({self._added})", one)] if self._added else [one] for one in (again, *texts))
        return any(
            len(parts) == len(other)
            and all(a == b or f" {a}" == b or a == f" {b}" for a, b in zip(parts, other, strict=True))
            for other in others
        )


def _use(what: str, function: Any, *args: Any, **options: Any) -> Any:
    """Call the library, and turn its exceptions on untrusted values into one sentence."""
    try:
        return function(*args, **options)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise KitError(f"{TOKENIZER} cannot be used: it fails when {what} ({brief(error)})") from error
