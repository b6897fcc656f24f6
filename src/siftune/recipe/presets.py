"""Recipes to start from, as text with a line of help for each setting. Nothing here imports torch."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import yaml

from siftune.base.settings import help_of
from siftune.methods import METHODS
from siftune.methods.options import GASTSettings
from siftune.recipe.schema import Recipe, method_of, rate_of, settings_of, shape_of

# name -> description and settings; besides these, each method is a preset
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gast-paper": ("GAST with the paper's half of the rows", {"method": "gast", "gast": GASTSettings(select=0.5)}),
    "target": (
        "a mixed pool, and a few correct rows of your task that come last; with --sift, the pool is sifted first",
        {"train": "pool.jsonl", "target": "few.jsonl"},
    ),
    "kit": ("a kit of siftune emulate: tune its outer layers, and send RUN/return back", {"model": "KIT"}),
    "parallel": ("parallel bottlenecks at the width of LLM-Adapters", {"adapter": "parallel", "rank": 256}),
}
PRESETS = {name: (method.line, {"method": name}) for name, method in METHODS.items()} | _MORE

_FIELDS = (  # settings to start with
    *("model", "train", "eval", "columns", "template", "max_length", "method", "target", "target_share", "target_last"),
    *("adapter", "rank", "alpha", "lr", "batch_size", "accumulate", "epochs", "steps", "schedule", "warmup", "optim"),
    *("checkpointing", "seed", "out"),
)
_WIDTH = 28  # of a setting; its help follows


def preset(name: str) -> Recipe:
    """A recipe to start from, with the values that its method and adapter determine."""
    recipe = replace(Recipe(train="train.jsonl"), **PRESETS[name][1])
    return replace(recipe, lr=rate_of(recipe), rank=shape_of(recipe).rank)


def preset_text(name: str) -> str:
    """A recipe to start from in YAML; settings without a value are comments.

    Example:
        >>> print(preset_text("dense").splitlines()[8])
        max_length: 512             # Maximum length of a row in tokens, prompt and completion together
    """
    recipe = preset(name)
    lines = [f"# {name}: {PRESETS[name][0]}", f"#   siftune train {name}.yaml", ""]
    for field in _FIELDS:
        if field.startswith("target_") and recipe.target is None:
            continue
        lines.append(_line(field, getattr(recipe, field), help_of(Recipe)[field]))
        if field == "method":
            lines += _settings(recipe)
    return "\n".join(lines) + "\n"


def _settings(recipe: Recipe) -> Iterator[str]:
    """The settings of a recipe's method."""
    for part, settings in zip(method_of(recipe).parts, settings_of(recipe), strict=True):
        helps: Mapping[str, str] = help_of(part.settings)
        if values := settings.to_dict():
            yield f"{part.settings.group}:"
            yield from (f"  {_line(name, value, helps[name])}" for name, value in values.items())


def _line(name: str, value: Any, words: str) -> str:
    shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    setting = f"# {name}:" if value is None or value == () else f"{name}: {shown}"
    return f"{setting:<{_WIDTH}}# {re.split(r'[.;] ', words)[0].removesuffix('.')}"
