"""`siftune recipe`: a recipe to start from."""

import sys
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG, Validated, nearest
from siftune.cli.options import Flag
from siftune.recipe.presets import PRESETS, preset_text


@dataclass(config=CONFIG)
class Options(Validated):
    """Print a recipe to start from, with a line of help for each setting; without a name, list the recipes.

    `siftune recipe gast > gast.yaml`, then `siftune train gast.yaml`.
    """

    name: Annotated[str, Flag("name", positional=True)] = ""
    """A method, or gast-paper, target, kit or parallel."""


def run(options: Options) -> dict[str, Any]:
    """Print a recipe, or the names of all."""
    if not options.name:
        width = max(map(len, PRESETS))
        sys.stdout.write("".join(f"{name:<{width}}  {line}\n" for name, (line, _) in PRESETS.items()))
        return {"recipes": {name: line for name, (line, _) in PRESETS.items()}}
    if options.name not in PRESETS:
        close = nearest(options.name, PRESETS)
        hint = f"did you mean {close}?" if close else f"there are {', '.join(PRESETS)}"
        raise RecipeError(f"there is no recipe {options.name}; {hint}")
    text = preset_text(options.name)
    sys.stdout.write(text)
    return {"name": options.name, "recipe": text}
