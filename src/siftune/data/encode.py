"""Rendering of rows as text, and tokenisation of the text.

How the parts of a row join:

- With a chat template, the prompt is the template's text up to the start of the assistant's turn. The completion is
  the rest of the template's text, with its end-of-turn token and without the white space after it. If a template
  adds nothing to the completion, the end-of-sequence token follows.
- Without one, prompt and completion join exactly, without a space between them. A beginning-of-sequence token comes
  first if the tokenizer adds one by itself, and the end-of-sequence token comes last.

Prompt and completion are tokenised separately and then joined, because at generation time the prompt is tokenised
alone. A space that the tokenizer puts before a text, as Llama 2's does, is not put before the completion.
`Encoder.prompt` and `Encoder.completion` give evaluation the same tokens as training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from siftune.base.errors import DataError, ModelError, RecipeError
from siftune.base.text import one_line
from siftune.data.read import read_template
from siftune.data.rows import Row
from siftune.data.turns import Message
from siftune.models.loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_REOPENED = (
    "the chat template changes the prompt once it is answered; the completion directly follows the prompt of "
    "generation time"
)
_REWRITTEN = "the chat template rewrites earlier turns; only the last turn has labels"


T = TypeVar("T")


def attempt(call: Callable[[], T]) -> T | BaseException:
    """Call a tokenizer; return the error that it raises, even a panic in Rust, which is no Exception."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        return error


class _Part(NamedTuple):
    """A part of a row's text, and whether it has labels."""

    text: str
    learned: bool


class Piece(NamedTuple):
    """Token ids of a part of a row, and whether they are labels."""

    ids: list[int]
    learned: bool


def labelled(pieces: list[Piece] | DataError, completion_only: bool = True) -> tuple[list[int], list[int]]:
    """Join a row's pieces.

    Args:
        pieces: from `Encoder.encode`.
        completion_only: only learned pieces have labels; False: all tokens.

    Returns:
        Token ids, and labels: -100 at tokens without a label.

    Raises:
        DataError: the row failed.
    """
    if isinstance(pieces, DataError):
        raise pieces
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        ids += piece.ids
        labels += piece.ids if piece.learned or not completion_only else [IGNORED] * len(piece.ids)
    return ids, labels


class _Rendered(NamedTuple):
    """The text of a row in parts that are tokenised separately; the last part is the completion."""

    parts: list[_Part]
    starts: list[int]  # token ids before the first part
    ends: list[int]  # token ids after the last part


class Encoder:
    """Renders and tokenises rows with one tokenizer and one way to use its chat template.

    Attributes:
        chat: whether the chat template is used.
        notes: number of rows with a warning about their rendering, by warning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | Path = "auto") -> None:
        """Decide whether the chat template is used.

        Args:
            tokenizer: any Hugging Face tokenizer with an end-of-sequence token.
            template: `chat`, `none`, `auto` for the chat template if the tokenizer has one, or a file with a chat
                template, which becomes the tokenizer's.

        Raises:
            RecipeError: unknown `template`, a file that cannot be read, or `chat` without a chat template.
            ModelError: the tokenizer has no end-of-sequence token.
        """
        use_template(template, tokenizer)
        self.tokenizer = tokenizer
        self.chat = writes_chat(template, tokenizer)
        self.notes: Counter[str] = Counter()
        if self.chat and not tokenizer.chat_template:
            raise RecipeError(
                "template is 'chat', but this tokenizer has no chat template; use template 'none', or an "
                "instruction-tuned model"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token; set one in its tokenizer_config.json")
        self._eos: list[int] = [tokenizer.eos_token_id]
        self._bos = self._leading_ids()
        end, letter, both = self._tokenize([(text, "a short text") for text in ("\n", "a", "\na")])
        self._changes_starts = both != end + letter

    def prompt(self, row: Row) -> list[int]:
        """Token ids of everything before the completion."""
        *before, _, _ = self._ids(self.render(row), row.origin)
        return [i for piece in before for i in piece]

    def completion(self, row: Row, text: str | None = None) -> list[int]:
        """Token ids of the completion with its end, or of `text` in its place."""
        *_, completion, ends = self._ids(self.render(row, text), row.origin)
        return completion + ends

    def encode(self, rows: Sequence[Row]) -> list[list[Piece] | DataError]:
        """Tokenise rows into pieces; the error instead for a row on which the template or the tokenizer fails.

        Rows are rendered and tokenised together, several times faster than one by one.
        """
        notes = Counter(self.notes)
        rendered = self._rendered(rows)
        sound = [(row, one) for row, one in zip(rows, rendered, strict=True) if isinstance(one, _Rendered)]
        try:
            ids = iter(self._tokenize_parts([(one, row.origin) for row, one in sound]))
        except DataError as error:
            self.notes = notes  # rows that are rendered again count again
            return [error] if len(rows) == 1 else [self.encode([row])[0] for row in rows]
        return [
            [
                Piece(one.starts, False),
                *(Piece(own, part.learned) for own, part in zip(next(ids), one.parts, strict=True)),
                Piece(one.ends, True),
            ]
            if isinstance(one, _Rendered)
            else one
            for one in rendered
        ]

    def render(self, row: Row, completion: str | None = None) -> _Rendered:
        """Render a row as text, cut between learned and other parts.

        Raises:
            DataError: the chat template refuses the row, or a conversation of several turns has no template.
        """
        answer = row.completion if completion is None else completion
        if self.chat and row.prompt:
            turns = _turns(row, answer)
            prompt = self._apply(turns[:-1], row.origin, open_turn=True)
            return self._render_chat(row, turns, self._apply(turns, row.origin), prompt)
        return self._render_plain(row, answer)

    def _rendered(self, rows: Sequence[Row]) -> list[_Rendered | DataError]:
        """Render rows; the template writes all conversations in two calls, or one by one if it refuses some."""
        turns = {i: _turns(row, row.completion) for i, row in enumerate(rows) if self.chat and row.prompt}
        try:
            fulls = dict(zip(turns, self._apply_all(list(turns.values())), strict=True))
            prompts = dict(zip(turns, self._apply_all([t[:-1] for t in turns.values()], open_turn=True), strict=True))
        except Exception:
            return [_or_error(self.render, row) for row in rows]
        return [
            _or_error(self._render_chat, row, turns[i], fulls[i], prompts[i])
            if i in turns
            else _or_error(self._render_plain, row, row.completion)
            for i, row in enumerate(rows)
        ]

    def _render_plain(self, row: Row, answer: str) -> _Rendered:
        if not row.prompt:
            return _Rendered([_Part(answer, True)], self._bos, self._eos)
        if len(row.prompt) > 1 or row.prompt[0].role != "user":
            roles = one_line(", ".join(message.role for message in row.prompt))
            raise DataError(
                f"{row.origin}: a conversation (turns before the completion: {roles}) needs a chat template, "
                "but none is in use; take an instruction-tuned model with template 'auto', or plain prompts"
            )
        return _Rendered([_Part(row.prompt[0].content, False), _Part(answer, True)], self._bos, self._eos)

    def _render_chat(self, row: Row, turns: list[Message], full: str, prompt: str) -> _Rendered:
        answer = turns[-1].content
        self._refuse_lost(turns, full, row.origin)
        if not full.startswith(prompt):
            self.notes[_REOPENED] += 1
            return _Rendered([_Part(prompt, False), _Part(answer, True)], [], self._eos)
        end = len(full.rstrip())
        spans = [*self._earlier_spans(turns, full, row.origin), (len(prompt), end)]
        # without a marker after the completion, the model would never learn to stop
        unmarked = full[len(prompt) : end].strip() == answer.strip()
        return _Rendered(_cut(full, spans), [], self._eos if unmarked else [])

    def _refuse_lost(self, turns: list[Message], full: str, origin: str) -> None:
        """Refuse a row of which the template leaves out a turn, such as one of a role that it does not know."""
        for i, turn in enumerate(turns):
            if turn.content.strip() in full:
                continue
            try:
                others = self._apply([*turns[:i], *turns[i + 1 :]], origin)
            except DataError:  # the template needs the turn
                continue
            if others == full:
                raise DataError(
                    f"{origin}: the chat template leaves out the turn of the role {one_line(turn.role)!r}; change its "
                    "role, remove the row, or give another template"
                )

    def _earlier_spans(self, turns: list[Message], full: str, origin: str) -> list[tuple[int, int]]:
        """Find the learned turns before the last in the full text.

        Empty if the template writes earlier turns differently from the last one, for example without their
        reasoning. The model would be trained on texts that it never has to write. A first turn of the assistant
        answers nothing and has no labels.
        """
        spans = []
        for i, turn in enumerate(turns[:-1]):
            if turn.learned and i:
                before = self._apply(turns[:i], origin, open_turn=True)
                after = self._apply(turns[: i + 1], origin).rstrip()
                if not (full.startswith(after) and after.startswith(before)):
                    self.notes[_REWRITTEN] += 1
                    return []
                spans.append((len(before), len(after)))
        return spans

    def _apply(self, turns: Sequence[Message], origin: str, open_turn: bool = False) -> str:
        try:
            return self._apply_all([turns], open_turn)[0]
        except Exception as error:  # templates raise errors of jinja and of their own
            raise DataError(
                f"{origin}: the chat template refuses the conversation ({one_line(str(error))}); its roles are "
                f"{one_line(', '.join(turn.role for turn in turns))}; change the row or use template 'none'"
            ) from error

    def _apply_all(self, conversations: Sequence[Sequence[Message]], open_turn: bool = False) -> list[str]:
        """Render conversations with the template; its errors are passed on."""
        messages = [[{"role": turn.role, "content": turn.content} for turn in turns] for turns in conversations]
        if not messages:
            return []
        texts = self.tokenizer.apply_chat_template(messages, add_generation_prompt=open_turn, tokenize=False)
        return [str(text) for text in texts]

    def _ids(self, rendered: _Rendered, origin: str) -> list[list[int]]:
        return [rendered.starts, *self._tokenize_parts([(rendered, origin)])[0], rendered.ends]

    def _tokenize_parts(self, rows: list[tuple[_Rendered, str]]) -> list[list[list[int]]]:
        """Tokenise the parts of rows with their origins.

        If the tokenizer changes the start of a text, a part is tokenised together with the part before it, whose tokens
        are then removed. If these tokens differ from those of that part alone, nothing can be removed.
        """
        ids = iter(self._tokenize([(part.text, origin) for one, origin in rows for part in one.parts]))
        parts = [[next(ids) for _ in one.parts] for one, _ in rows]
        if self._changes_starts:
            pairs = [(a.text + b.text, origin) for one, origin in rows for a, b in pairwise(one.parts)]
            joined = iter(self._tokenize(pairs))
            for own in parts:
                for place, before in enumerate(own[:-1], 1):
                    both = next(joined)
                    if both[: len(before)] == before:
                        own[place] = both[len(before) :]
        return parts

    def _tokenize(self, texts: list[tuple[str, str]], special: bool = False) -> list[list[int]]:
        """Tokenise pairs of a text and its origin."""
        ids = self._try([text for text, _ in texts], special)
        if isinstance(ids, list):
            return ids
        errors = ((origin, ids if len(texts) == 1 else self._try([text], special)) for text, origin in texts)
        origin, error = next(((o, e) for o, e in errors if isinstance(e, BaseException)), ("the rows", ids))
        raise DataError(
            f"{origin}: the tokenizer fails on the text ({' '.join(str(error).split())[:200]}); "
            "change or remove the row, or take another tokenizer"
        ) from error

    def _try(self, texts: list[str], special: bool) -> list[list[int]] | BaseException:
        if not texts:
            return []
        encoded = attempt(
            lambda: self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        )
        return encoded if isinstance(encoded, BaseException) else list(encoded["input_ids"])

    def _leading_ids(self) -> list[int]:
        """Return the ids that the tokenizer puts before a text by itself, such as a beginning-of-sequence token."""
        bare, dressed = (self._tokenize([("a", "the text 'a'")], special)[0] for special in (False, True))
        starts = (i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
        return dressed[: next(starts, 0)]


def _turns(row: Row, answer: str) -> list[Message]:
    return [*row.prompt, Message("assistant", answer, learned=True)]


def _or_error(render: Callable[..., _Rendered], *arguments: Any) -> _Rendered | DataError:
    try:
        return render(*arguments)
    except DataError as error:
        return error


def _cut(text: str, spans: list[tuple[int, int]]) -> list[_Part]:
    """Cut a text at the learned spans, without the text after the last."""
    parts, position = [], 0
    for start, end in spans:
        parts += [_Part(text[position:start], False), _Part(text[start:end], True)]
        position = end
    return parts


def use_template(template: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the chat template of a file that of a tokenizer; do nothing for the words auto, chat and none.

    Raises:
        RecipeError: The file cannot be read.
    """
    if str(template) in ("auto", "chat", "none"):
        return
    tokenizer.chat_template = read_template(Path(template))


def writes_chat(template: str | Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether rows are rendered by a tokenizer's chat template; `template` as for `Encoder`."""
    return template != "none" and (template != "auto" or bool(tokenizer.chat_template))
