"""How a command's options look in its help: text that flows, and values as a user types them."""

import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_type_hints

from siftune.base.settings import help_of

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

_LONG = 12  # characters that are not said twice
_LIST = re.compile(r"\{?\[(?P<one>.+) \[(?:(?P=one) )?\.\.\.\]\]\}?")


def flow_text(kind: type) -> None:
    """Give every field its help on one line: the parser would break it where the source does.

    Args:
        kind: A dataclass of options, some of which may be groups of options.
    """
    for field, words in _fields(kind):
        field.metadata = MappingProxyType({**field.metadata, "help": words})


def _fields(kind: type) -> Iterator[tuple["Field[Any]", str]]:
    words = {
        name: text for owner in reversed(kind.__mro__) if is_dataclass(owner) for name, text in help_of(owner).items()
    }
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name])
        if field.name in words:
            yield field, words[field.name]


def values_as_typed() -> "ConstructorRegistry":
    """Rules by which the parser names the values of options: see `as_typed`."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()
    asking = False

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> Any:
        nonlocal asking
        if asking:  # the parser's own rules
            return None
        asking = True
        try:
            found = ConstructorRegistry.get_primitive_spec(info)
        finally:
            asking = False
        return replace(found, metavar=as_typed(found.metavar)) if isinstance(found, PrimitiveConstructorSpec) else found

    return registry


def as_typed(values: str) -> str:
    """What stands for an option's values: without None, of which the help tells, and lists without brackets.

    Example:
        >>> as_typed("{None}|INT"), as_typed("{None,4bit,8bit}"), as_typed("STR|{[STR [STR ...]]}")
        ('INT', '{4bit,8bit}', 'STR [STR ...]')
        >>> as_typed("{None}|{[FLOAT [FLOAT ...]]}"), as_typed("[{embeddings,head} [{embeddings,head} ...]]")
        ('FLOAT [FLOAT ...]', '{embeddings,head} ...')
    """
    plain = values.removeprefix("{None}|").replace("{None,", "{")
    first, _, rest = plain.partition("|")
    found = _LIST.fullmatch(rest or plain)
    if found is None or (rest and found["one"] != first):
        return plain
    one = found["one"]
    return f"{one} ..." if len(one) > _LONG else f"{one} [{one} ...]"
