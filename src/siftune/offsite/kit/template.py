"""Chat templates of kits: rendering in a child with limits, and comparison with the text around placeholders.

A chat template is a program. It may write fixed text around messages, and must write every message once, in order and
as is, except for white space at its ends. A system message may stand elsewhere, as in Mistral's templates. So each row
is compared with the text around placeholders for the same roles.
Text around messages must also be part of what `siftune verify` prints.

`Renderer` runs in the child. `ChatTemplate` compares, in the parent. The environment is that of transformers, without
`random` and `lipsum`, and with one date, so that a row is always rendered the same way. The bounds are ours.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError, ext, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from siftune.base.errors import DataError, KitError
from siftune.offsite.kit.limited import Child, ChildError, Limits
from siftune.offsite.kit.strict import brief, shown

TEMPLATE = "chat_template.jinja"
MAX_FIXED, PER_MESSAGE = 1 << 14, 256  # characters that a template may write besides the messages
LIMITS = Limits(memory_mb=256, cpu_s=5, wall_s=5)
BATCH = 200  # conversations in a request, which take a fraction of a second
TODAY = datetime(2026, 1, 1)  # the date in every template

Chat = list[dict[str, str]]
Roles = tuple[str, ...]

# the conversations that are tried, with all their beginnings: templates often write the last message differently
_TALKS = (
    *("user assistant user assistant user", "system user assistant user assistant user"),
    *("user assistant tool assistant user", "user assistant tool tool assistant"),
    "system user assistant tool tool assistant user",
)
_STRIPS: tuple[Callable[[str], str], ...] = (
    *(str.strip, str.lstrip, str.rstrip),
    *(lambda text: text.strip("\n"), lambda text: text.lstrip("\n"), lambda text: text.rstrip("\n")),
)


class Renderer:
    """A compiled chat template, in the child.

    Args:
        source: Its text.
        special: Special tokens by name, which a template may write.

    Raises:
        KitError: It is no template.
    """

    def __init__(self, source: str, special: dict[str, str]) -> None:
        self._special = special
        try:
            self._template = _environment().from_string(source)
        except MemoryError:
            raise
        except Exception as error:
            raise KitError(f"{TEMPLATE} is no template ({brief(error)})") from error

    def render(self, chat: Chat, opened: bool) -> dict[str, str]:
        """Render a conversation, with the start of the assistant's turn or without.

        Returns:
            `text`, or `fault` if the template refuses the conversation.
        """
        try:
            text = self._template.render(
                messages=chat, tools=None, documents=None, add_generation_prompt=opened, **self._special
            )
        except MemoryError:
            raise
        except Exception as error:  # templates raise errors of Jinja, of Python and of their own
            return {"fault": brief(error)}
        if len(text) - sum(len(message["content"]) for message in chat) > MAX_FIXED + PER_MESSAGE * len(chat):
            return {"fault": f"it writes {len(text)} characters"}
        return {"text": text}


class ChatTemplate:
    """The chat template of a kit, which runs in a child only.

    Attributes:
        fixed: All fixed text that it may write, with the roles of the messages before and after it.
    """

    def __init__(self, child: Child) -> None:
        """Try the template, which the child has compiled, on conversations of the usual roles.

        Raises:
            KitError: It refuses a user and an assistant, changes, moves or leaves out a message, or exceeds a limit.
        """
        self._child = child
        self._pieces: dict[tuple[Roles, bool], list[str | int]] = {}
        self.fixed: dict[tuple[str, str, str], None] = {}
        for talk in _TALKS:
            for end in range(1, len(talk.split()) + 1):
                roles = tuple(talk.split()[:end])
                for opened in (True, False) if roles[-1] == "assistant" else (True,):
                    pieces = self._pieces_of(roles, opened)
                    if pieces is None and (roles, opened) in ((("user",), True), (("user", "assistant"), False)):
                        fault = "fails on it, or does not write each message once, in order and as is"
                        raise KitError(f"{TEMPLATE}: a conversation of {' and '.join(roles)}: {fault}")
                    self.fixed |= dict.fromkeys(_fixed(pieces or [], roles, opened))

    def write(self, chats: Sequence[Chat], opened: bool) -> list[str]:
        """Render conversations, and compare them with placeholders.

        Args:
            chats: Messages with `role` and `content`.
            opened: Whether the start of the assistant's turn follows.

        Raises:
            DataError: The template refuses a conversation, changes a message, or writes other text around one.
            KitError: It exceeds a limit.
        """
        texts = []
        for start in range(0, len(chats), BATCH):
            for chat, reply in zip(chats[start:], self._ask(chats[start : start + BATCH], opened), strict=False):
                roles = tuple(message["role"] for message in chat)
                if "fault" in reply:
                    raise DataError(f"it fails: {reply['fault']}")
                pieces = self._pieces_of(roles, opened)
                if pieces is None:
                    raise DataError("it does not write each message of such roles once, in order and as is")
                if new := set(_fixed(pieces, roles, opened)) - self.fixed.keys():
                    before, after, text = min(new)
                    raise DataError(
                        f"it writes {shown(text)} from {before} to {after}, which `siftune verify` does not show"
                    )
                if not _agrees(reply["text"], pieces, [message["content"] for message in chat]):
                    raise DataError("it changes a message, or the text around one, because of the words in it")
                texts.append(reply["text"])
        return texts

    def _ask(self, chats: Sequence[Chat], opened: bool) -> list[dict[str, str]]:
        try:
            return self._child.ask({"render": [[chat, opened] for chat in chats]}, LIMITS)  # type: ignore[no-any-return]
        except ChildError as error:
            raise KitError(f"{TEMPLATE}: {error}") from error

    def _pieces_of(self, roles: Roles, opened: bool) -> list[str | int] | None:
        """Fixed text and numbers of messages, by turns, as written for placeholders.

        None if not all are there once, and all but a system message in order.
        """
        if (roles, opened) not in self._pieces:
            marks = [f"<<message {number} of {len(roles)}>>" for number in range(len(roles))]
            chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            [reply] = self._ask([chat], opened)
            if "text" not in reply:
                return None
            parts = re.split(rf"<<message ([0-9]{{1,6}}) of {len(roles)}>>", reply["text"])
            pieces: list[str | int] = [int(part) if place % 2 else part for place, part in enumerate(parts)]
            order = [int(part) for part in parts[1::2]]
            talk = [number for number in order if number < len(roles) and roles[number] != "system"]
            if sorted(order) != list(range(len(roles))) or talk != sorted(talk):
                return None
            self._pieces[roles, opened] = pieces
        return self._pieces[roles, opened]


def _fixed(pieces: Sequence[str | int], roles: Roles, opened: bool) -> Iterator[tuple[str, str, str]]:
    """Fixed text with the roles of the messages before and after it."""
    order = [roles[number] for number in pieces[1::2] if isinstance(number, int)]
    ends = pairwise(["start", *order, "answer" if opened else "end"])
    for (before, after), text in zip(ends, pieces[::2], strict=False):
        yield before, after, str(text)


def _agrees(text: str, pieces: Sequence[str | int], contents: Sequence[str]) -> bool:
    """Whether a text consists of pieces and contents, of which the template may strip white space."""
    ends = {len(str(pieces[0]))} if text.startswith(str(pieces[0])) else set()
    for number, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        content = contents[int(number)]
        nexts = {f"{one}{piece}" for one in (content, *(strip(content) for strip in _STRIPS))}
        ends = {end + len(one) for end in ends for one in nexts if text.startswith(one, end)}
    return len(text) in ends


class _Generation(ext.Extension):
    """`{% generation %}`: marks what the assistant writes, and changes nothing of it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call with a body, which has a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _unchanged(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        return caller()


class _Function:
    """A callable for templates, whose text has no address, which would differ between the trial and later processes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    def __repr__(self) -> str:
        return "function"


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without objects that tell one process from another."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return _without_address(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return _without_address(super().getitem(obj, argument))


def _without_address(value: Any) -> Any:
    return _Function(value) if callable(value) and not isinstance(value, Undefined | Macro | LoopContext) else value


def _listed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that returns a list in place of an iterator, whose text has an address."""

    @functools.wraps(function)
    def listed(*args: Any, **options: Any) -> Any:
        value = function(*args, **options)
        return list(value) if isinstance(value, Iterator) else value

    return listed


class _Namespace(Namespace):
    """`namespace` in templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no name for self: a template may want to store one
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name like {shown(name)}")


def _environment() -> _Environment:
    """The sandbox with the names of transformers, which takes seconds to import."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
    environment.filters = {name: _listed(use) for name, use in environment.filters.items() if name != "random"}
    environment.filters["tojson"] = _to_json
    environment.globals = {
        "range": environment.globals["range"],
        "namespace": _Namespace,
        "dict": _Function(dict),
        "raise_exception": _Function(_raise),
        "strftime_now": _Function(TODAY.strftime),
    }
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)
