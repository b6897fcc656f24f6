"""Try an untrusted chat template in Jinja's sandbox, as transformers will render it.

The sandbox bounds neither time nor memory, so this runs in a child with limits, see limited.py. A trial cannot prove
what a program will do: what is said is drawn by chance, so that no template can know it, and of many kinds, and texts
that stand in the template itself are among those that are tried. Nothing in it may be drawn by chance or change within
a day: a prompt is rendered by itself and with its completion, and must come out the same. The bounds are ours.
"""

import contextlib
import json
import secrets
import string
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, ext, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import brief, shown

TEMPLATE = "chat_template.jinja"
MAX_FIXED = 1 << 16  # characters that a template may write whatever is said, such as its own system message
PER_MESSAGE = 512  # characters around a message
PER_CHARACTER = 4  # characters that one of a message may become, as in JSON
MAX_SHOWN = 2000  # characters of the example
MAX_WORDS = 64  # texts in the template that are tried
MAX_SECONDS = 0.5  # of processor time for a conversation; real ones take thousandths

Chat = list[dict[str, str]]
Render = Callable[[Chat, bool], str]

# what is said, around words that are drawn; none ends in white space, which many templates take off
_SAYINGS = (
    "{} é 東 {}", "{}", "{} {}.\n\n- {}\n\t1. {}", "<b>{}</b> &amp; \"{}\" '{}' {{{{ x }}}} https://example.org/?q={}",
    string.ascii_letters + string.digits + string.punctuation.replace("{", "").replace("}", "") + "{}",
)  # fmt: skip
_TIMES = (datetime(2026, 1, 5, 0, 0, 1), datetime(2026, 1, 5, 23, 59, 58, 999999))  # a day's first and last
_EXAMPLE = [("user", "How many legs has a spider?"), ("assistant", "Eight."), ("user", "And an ant?")]


class _FailsError(KitError):
    """The template refuses a conversation, or cannot render it."""


def try_template(source: str, named: Mapping[str, str]) -> str:
    """Render a template on conversations of many kinds; `named` are special tokens by name, which it may use.

    Returns:
        A short conversation in the template's form, cut at `MAX_SHOWN` characters.

    Raises:
        KitError: It fails for a user and an assistant, leaves out what one of them or the system says, or writes more
            than a bounded amount for every message and character.
    """
    render, words = _compiled(source, named, datetime.now())
    for turns in (1, 2, 3, 4, 9):
        _check_complete(render, _talk(turns), open_turn=turns % 2 == 1)
    for saying in _SAYINGS:
        _check_complete(render, _talk(2, saying=saying), open_turn=False)
    with contextlib.suppress(_FailsError):  # many refuse what a system says; none may drop it
        _check_complete(render, [{"role": "system", "content": _drawn(_SAYINGS[0])}, *_talk(1)], open_turn=True)
    _check_growth(render, "messages", [_talk(turns) for turns in (32, 64, 128)])
    _check_growth(render, "characters", [_talk(2, length) for length in (2000, 4000, 8000)])
    for word in words:
        _check_word(render, word)
    example = [{"role": role, "content": content} for role, content in _EXAMPLE]
    _check_the_same([_said(_compiled(source, named, now)[0], example, True) for now in _TIMES])
    return _said(render, example, True)[:MAX_SHOWN]


def _compiled(source: str, named: Mapping[str, str], now: datetime) -> tuple[Render, list[str]]:
    """The template as a function of a conversation and whether the assistant's turn is opened, and texts in it."""
    environment = _environment(now)
    try:
        template = environment.from_string(source)
        constants = [node.value for node in environment.parse(source).find_all(nodes.Const)]
    except MemoryError:
        raise
    except Exception as error:
        raise KitError(f"{TEMPLATE} is no template ({brief(error)})") from error

    def render(chat: Chat, open_turn: bool) -> str:
        # transformers hands over just these
        return template.render(messages=chat, tools=None, documents=None, add_generation_prompt=open_turn, **named)

    return render, list(dict.fromkeys(word for word in constants if isinstance(word, str)))[:MAX_WORDS]


def _talk(turns: int, length: int = 0, saying: str = _SAYINGS[0]) -> Chat:
    """User and assistant by turns, each of whom says what nobody said before."""
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": _drawn(saying).ljust(length, "x")} for turn in range(turns)]


def _drawn(saying: str) -> str:
    return saying.format(*(secrets.token_hex(2 if saying == "{}" else 6) for _ in range(4)))


def _said(render: Render, chat: Chat, open_turn: bool) -> str:
    began = time.process_time()
    try:
        text = render(chat, open_turn)
    except MemoryError:
        raise
    except Exception as error:  # templates raise errors of Jinja, of Python and of their own
        turns = f"{len(chat)} turns ({', '.join(message['role'] for message in chat[:4])})"
        raise _FailsError(f"{TEMPLATE} fails on a conversation of {turns}: {brief(error)}") from error
    _check_size(text, chat)
    if (took := time.process_time() - began) > MAX_SECONDS:
        raise KitError(
            f"{TEMPLATE} takes {took:.2f} s for {len(chat)} messages with {_heard(chat)} characters; it may take "
            f"{MAX_SECONDS}"
        )
    return text


def _heard(chat: Chat) -> int:
    return sum(len(message["content"]) for message in chat)


def _check_size(text: str, chat: Chat) -> None:
    heard = _heard(chat)
    most = MAX_FIXED + PER_MESSAGE * len(chat) + PER_CHARACTER * heard
    if len(text) > most:
        raise KitError(
            f"{TEMPLATE} writes {len(text)} characters for {len(chat)} messages with {heard}; it may write {most}"
        )


def _check_complete(render: Render, chat: Chat, open_turn: bool) -> str:
    """Refuse a template that leaves out what is said; it may write it as JSON does. Return the text."""
    text = _said(render, chat, open_turn)
    for message in chat:
        content = message["content"]
        if content not in text and _to_json(content)[1:-1] not in text:
            turns = f"{len(chat)} turns"
            raise KitError(
                f"{TEMPLATE} leaves out or changes what the {message['role']} says in a conversation of {turns}: "
                f"{content[:40]!a}"
            )
    return text


def _check_the_same(texts: Sequence[str]) -> None:
    """Refuse what is written one way early in a day and another way late."""
    if len(set(texts)) > 1:
        raise KitError(f"{TEMPLATE} writes the time of the day, so that no row is rendered the same way twice")


def _check_growth(render: Render, what: str, chats: Sequence[Chat]) -> None:
    """Of conversations, each twice as long as the one before, the third may not add much more than twice as much."""
    sizes = [len(_check_complete(render, chat, False)) for chat in chats]
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    if second > 3 * max(first, 0) + PER_MESSAGE:
        raise KitError(f"{TEMPLATE} writes ever more for each of the {what}: {first} characters, and then {second}")


def _check_word(render: Render, word: str) -> None:
    """Say a text of the template, and be somebody of that name: it may refuse that, but not blow up."""
    for roles in (("user", "assistant"), (word,)):
        with contextlib.suppress(_FailsError):
            _said(render, [{"role": role, "content": word} for role in roles], False)


class _Generation(ext.Extension):
    """`{% generation %}`: marks what the assistant writes, and changes nothing of it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call with a body, which has a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _as_it_is(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` in templates: what makes one, and nothing else of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


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


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """The sandbox with what transformers puts into it, which takes seconds to import, but for what draws by chance."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": now.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)
