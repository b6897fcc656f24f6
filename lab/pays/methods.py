"""The methods that are compared, as plain dictionaries, and how a command line names variants of them.

recipe     fields of the recipe, among them `method` and the groups of its settings, passed on as they are
keep       a rule that keeps some rows of a batch: see `subset.py`
select     how many rows that rule keeps: a count, or a share such as 0.25
rows       what is trained on: see `training_rows.py`; the pool where it is not given
late       share of the steps, the last ones, in which the known rows come; they are a quarter of all rows all the same
stop       share of the known rows that are held back, to keep the adapter of the step at which they fare best
rule       an experimental rule in the place of GAST's choice: see `rules.py`
loss       "rows": every row weighs alike, however long it is
untrained  measure the model as it is
"""

import copy
import json
from typing import Any

Method = dict[str, Any]


def _gast(**settings: Any) -> dict[str, Any]:
    """Recipe of GAST with a support set of known rows: eight in a step, a quarter of the batch followed."""
    usual = {"support": "dataset", "support_size": 8, "choice": "topk", "score": "cosine", "select": 0.25}
    return {"recipe": {"method": "gast", "gast": {**usual, **settings}}}


def _trim(select: float = 0.25) -> dict[str, Any]:
    """Recipe of Trim, which follows the rows of a batch with the smallest loss."""
    return {"recipe": {"method": "trim", "trim": {"select": select}}}


METHODS: dict[str, Method] = {
    "untrained": {"untrained": True},
    "dense": {},
    "dense+known": {"rows": "pool+known"},
    "dense+known-weighted": {"rows": "pool+weighted"},
    "known-alone": {"rows": "known"},
    "known-alone-stopped": {"rows": "known", "stop": 0.2},
    "retrieval": {"rows": "retrieved"},
    "retrieval+known-weighted": {"rows": "retrieved+weighted"},
    "ceiling": {"keep": "target"},
    "random": _gast(support="rest", choice="random"),
    "small-loss": _trim(),
    "small-excess": {"keep": "small-excess", "select": 0.25},
    "trim-loss": _trim(0.75),
    "gast-paper": _gast(support_size=4, choice="stochastic", score="inner", select=0.5),
    "gast": _gast(),
    "late-known": {"rows": "pool+weighted", "late": 1 / 3},
    "late-gast": {**_gast(), "rows": "pool+weighted", "late": 1 / 3},
    "late-gast-half": {**_gast(select=0.5), "rows": "pool+weighted", "late": 1 / 3},
    "gast-relu": {**_gast(), "rule": "relu"},
    "trim-momentum-cosine": {
        "recipe": {
            "method": "gast",
            "gast": {"support": "momentum", "choice": "topk", "score": "cosine", "select": 0.75},
        }
    },
    "greats": {"recipe": {"method": "greats", "greats": {"select": 0.25}}},
    "ist": {"recipe": {"method": "ist"}},
    "rst": {"recipe": {"method": "rst"}},
    "lisa": {"recipe": {"method": "lisa"}},
    "cut": {"recipe": {"method": "cut"}},
    "masked-update": {"masked": 0.5},
}

_OWN = (
    "keep",
    "select",
    "rows",
    "late",
    "stop",
    "rule",
    "masked",
    "loss",
    "untrained",
)  # the rest are a recipe's


def method_of(words: str) -> dict[str, Any]:
    """Read `gast`, or a variant `wide=gast,gast.select:0.5,rows:pool+weighted,rank:8`.

    What follows the name are the method that it varies, if any, and options: the keys above, fields of the recipe, or
    settings of a method's group with a point between.

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
        else:
            group, point, setting = key.partition(".")
            recipe = method.setdefault("recipe", {})
            target = recipe.setdefault(group, {}) if point else recipe
            target[setting or key] = _value(text)
    return method


def _named(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; use {', '.join(METHODS)}, or NAME=METHOD,KEY:VALUE,...")
    return copy.deepcopy(METHODS[name])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a word
        return text
