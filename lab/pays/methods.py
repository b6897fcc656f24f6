"""Methods to compare, as plain dictionaries, and their variants on the command line.

rows       rows that train: "pool", the default, "few" for those of the target alone, "sifted" for those that
           `siftune sift` selects, without its adapter, or a rule of `rivals.py`
share      with a rule: share of the pool that it chooses; if not given, as many rows as sifting selects
target     give the target's rows with --target
sift       give --sift; a number is its value
flags      further flags of `siftune train`, by name
untrained  measure the base model
engine     for a private run: what clips and noises in place of siftune, "opacus" or "opacus-ghost"
kit        train a kit in place of the model, and plug the return in; flags of `siftune emulate` for this kit
"""

import copy
import json
from typing import Any

Method = dict[str, Any]

# Opacus' hooks do not see adapters that are cast while they run
_PRIVATE = {"dp-epsilon": 8.0, "dp-delta": 1e-5, "dtype": "float32"}
_GAST = {"method": "gast"}

METHODS: dict[str, Method] = {
    "untrained": {"untrained": True},
    "few": {"rows": "few"},
    "dense": {},
    "target": {"target": True},
    "sifted": {"target": True, "sift": True},
    "sifted-base": {"target": True, "rows": "sifted"},
    "random": {"target": True, "rows": "random"},
    "oracle": {"target": True, "rows": "oracle"},
    "retrieved": {"target": True, "rows": "retrieved"},
    "rds": {"target": True, "rows": "rds"},
    "less": {"target": True, "rows": "less"},
    "ifd": {"target": True, "rows": "ifd"},
    "gast": {"flags": _GAST},
    "target-gast": {"target": True, "flags": _GAST},
    "sifted-gast": {"target": True, "sift": True, "flags": _GAST},
    **{name: {"flags": {"method": name}} for name in ("ist", "rst")},
    "dp": {"flags": _PRIVATE},
    "opacus": {"flags": _PRIVATE, "engine": "opacus"},
    "outer": {"flags": {"layers": [0, 1, -2, -1]}},  # what a kit lets train, on the model itself
    "kit": {"kit": {}},
}

_OWN = ("rows", "share", "target", "sift", "untrained", "engine")  # other options are flags of `siftune train`


def method_of(words: str) -> Method:
    """Read `gast`, or a variant `wide=target-gast,gast.select:0.5,rank:8`.

    After the equals sign come the method that it varies, if any, and options: the keys above, flags, or `kit.` and
    flags of `siftune emulate`.

    Returns:
        The method with its `name`.

    Raises:
        ValueError: There is no such method.
    """
    name, varies, options = words.partition("=")
    if not varies:
        return {"name": name, **_named(name)}
    method: Method = {"name": name}
    for option in options.split(","):
        key, colon, text = option.partition(":")
        if not colon:
            method |= _named(key)
        elif key in _OWN:
            method[key] = _value(text)
        elif key.startswith("kit."):
            method.setdefault("kit", {})[key.removeprefix("kit.").replace("_", "-")] = _value(text)
        else:
            method.setdefault("flags", {})[key.replace("_", "-")] = _value(text)
    return method


def _named(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; use {', '.join(METHODS)}, or NAME=METHOD,KEY:VALUE,...")
    return copy.deepcopy(METHODS[name])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # text
        return text
