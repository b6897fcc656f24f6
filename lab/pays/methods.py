"""Methods to compare, as plain dictionaries, and their variants on the command line.

recipe     fields of the recipe, among them `method` and the groups of its settings, passed on as they are
keep       "target": train on the correct target rows of each batch alone; see `subset.py`
rows       what is trained on: see `training_rows.py`; the pool where it is not given
share      share of the pool that is kept; if not given, that of siftune sift, and a quarter for the other plans
soft       for sifting: train on all rows of the task, each with the weight 1 / (1 + exp(score))
rounds     for sifting: how often; the second time the tuning also takes the rows that were selected
late       share of the steps, the last ones, in which the known rows come; they are a quarter of all rows all the same
untrained  measure the model as it is
engine     for a private run: what clips and noises in place of siftune, "opacus" or "opacus-ghost"
"""

import copy
import json
from typing import Any

Method = dict[str, Any]


def _gast(**settings: Any) -> dict[str, Any]:
    """Recipe of GAST with a support set of known rows: eight in a step, a quarter of the batch followed."""
    usual = {"support": "dataset", "support_size": 8, "choice": "topk", "score": "cosine", "select": 0.25}
    if settings.get("support") == "rest":
        del usual["support_size"]  # which does not apply: there are no support rows
    return {"recipe": {"method": "gast", "gast": {**usual, **settings}}}


# Opacus' hooks do not see adapters that are cast while they run
_PRIVATE = {"dp_epsilon": 8.0, "dp_delta": 1e-5, "dtype": "float32"}

METHODS: dict[str, Method] = {
    "untrained": {"untrained": True},
    "dense": {},
    "dense+known": {"rows": "pool+known"},
    "dense+known-weighted": {"rows": "pool+weighted"},
    "known-alone": {"rows": "known"},
    "retrieval": {"rows": "retrieved"},
    "retrieval+known-weighted": {"rows": "retrieved+weighted"},
    "sifted": {"rows": "sifted+weighted", "late": 1 / 3},
    "sifted-twice": {"rows": "sifted+weighted", "late": 1 / 3, "rounds": 2},
    "sifted-soft": {"rows": "sifted+weighted", "late": 1 / 3, "soft": True},
    "sifted-gast": {**_gast(select=0.5), "rows": "sifted+weighted", "late": 1 / 3},
    "less": {"rows": "less+weighted", "late": 1 / 3},
    "late-retrieved": {"rows": "retrieved+weighted", "late": 1 / 3},
    "ceiling": {"keep": "target"},
    "random": _gast(support="rest", choice="random"),
    "gast-paper": _gast(support_size=4, choice="stochastic", score="inner", select=0.5),
    "gast": _gast(),
    "late-known": {"rows": "pool+weighted", "late": 1 / 3},
    "late-gast": {**_gast(), "rows": "pool+weighted", "late": 1 / 3},
    "late-gast-half": {**_gast(select=0.5), "rows": "pool+weighted", "late": 1 / 3},
    "greats": {"recipe": {"method": "greats", "greats": {"select": 0.25}}},
    "ist": {"recipe": {"method": "ist"}},
    "rst": {"recipe": {"method": "rst"}},
    "lisa": {"recipe": {"method": "lisa"}},
    "cut": {"recipe": {"method": "cut"}},
    "dp": {"recipe": _PRIVATE},
    "opacus": {"recipe": _PRIVATE, "engine": "opacus"},
}

_OWN = ("keep", "rows", "share", "soft", "rounds", "late", "untrained", "engine")  # the rest are fields of a recipe


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
