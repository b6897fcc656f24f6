"""Callbacks from groups in a tool's YAML, such as `gast: {select: 0.75}`, as in siftune's own recipes."""

from collections.abc import Iterable, Mapping
from typing import Any

import siftune
from siftune.base.errors import RecipeError
from siftune.base.settings import Settings, nearest
from siftune.methods import Part, all_parts

PLAIN = {"label_logits": "LabelLogits"}
"""Boolean keys, and the public name of the callback of each."""

_OF_CALLBACKS = ("seed", "layers")


def keys() -> list[str]:
    """All keys of siftune in a tool's YAML: the methods' groups, and `PLAIN`."""
    return [*(part.settings.group for part in all_parts()), *PLAIN]


def callbacks(given: Mapping[str, Any]) -> list[Any]:
    """Create the callbacks of a YAML file.

    Args:
        given: Keys and values of the file. Of keys that are not siftune's, only `seed` is read: the default of methods.

    Returns:
        `TrainerCallback`s, for transformers' Trainer and those derived from it.

    Raises:
        RecipeError: No method is named, a value is out of its range, or a name in a group is none of its settings.

    Example:
        >>> [type(each).__name__ for each in callbacks({"gast": {"select": 0.5}, "label_logits": True, "lora_r": 8})]
        ['GAST', 'LabelLogits']
    """
    seed = given.get("seed") or 0
    groups = [(part, given.get(part.settings.group)) for part in all_parts()]
    created = [_method(part, options, seed) for part, options in groups if options is not None]
    created += [_plain(key, given[key]) for key in PLAIN if given.get(key) not in (None, False)]
    if not created:
        raise RecipeError(
            f"there is nothing for siftune to do: add a method, such as gast: {{}}; keys: {', '.join(keys())}"
        )
    return created


def _method(part: Part, options: Any, seed: int) -> Any:
    group = part.settings.group
    if not isinstance(options, Mapping):
        raise RecipeError(
            f"{group} is {options!r}, but must be a group of its settings; {group}: {{}} has the defaults"
        )
    names = (*Settings.names(part.settings), *_OF_CALLBACKS)
    _refuse_unknown(group, options, names)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return part.make(**{"seed": seed, **values})


def _refuse_unknown(group: str, options: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in options:
        if name not in names:
            close = nearest(str(name), names)
            hint = f"did you mean {close!r}?" if close else f"it has {', '.join(names)}"
            raise RecipeError(f"{group} has no setting {name!r}: {hint}")


def _plain(key: str, value: Any) -> Any:
    if value is not True:
        raise RecipeError(f"{key} is {value!r}, but must be true or false")
    return getattr(siftune, PLAIN[key])()
