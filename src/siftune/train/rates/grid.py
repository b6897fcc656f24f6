"""Learning-rate grids: methods, rates and seeds of a sweep, and the recipe of each method."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from siftune.base.errors import InputError, RecipeError
from siftune.base.settings import nearest
from siftune.methods import METHODS
from siftune.recipe.checks import check
from siftune.recipe.read import anchored, recipe_values
from siftune.recipe.schema import Recipe, holds_out, rate_of, settings_of

T = TypeVar("T")

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # ours: the default grid around a recipe's rate

RECORD = "rates.json"  # in the folder of a sweep
# settings that a sweep varies, or that do not affect its results
_FREE = {
    "method", "lr", "seed", "out", "resume", "save_every", "eval_every", "patience", "log_every", "report_to",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Methods, rates and seeds of a sweep."""

    methods: tuple[str, ...]
    rates: tuple[float, ...]  # peak learning rates, ascending
    seeds: tuple[int, ...]  # every method runs at every rate with each seed

    def cells(self) -> Iterator[tuple[str, float, int]]:
        """Method, rate and seed of every run, one seed after the other: an interrupted sweep has complete curves."""
        return ((method, rate, seed) for seed in self.seeds for method in self.methods for rate in self.rates)


@dataclass(frozen=True)
class LRRun:
    """Result of one run of a sweep."""

    method: str
    lr: float  # peak learning rate
    seed: int
    heldout_loss: float | None  # of the tuned model, in nats per label token; None if the run diverged
    train_loss: float | None  # mean over the last tenth of the steps
    steps: int
    seconds: float  # of training and evaluation
    diverged: str | None = None  # how it diverged

    @property
    def cell(self) -> tuple[str, float, int]:
        """Its place in the grid."""
        return self.method, self.lr, self.seed


@dataclass(frozen=True)
class LRResult:
    """State of a sweep's record."""

    base_heldout_loss: float  # of the base model, in nats per label token
    runs: list[LRRun]  # finished runs, in the order of their ends


def result_of(state: Mapping[str, Any]) -> LRResult | None:
    """The result of a sweep by the state of its record; None before a run has finished.

    Raises:
        InputError: The state has another form.
    """
    try:
        return LRResult(state["base_heldout_loss"], [LRRun(**run) for run in state["runs"]]) if state else None
    except (KeyError, TypeError) as error:
        raise InputError(f"{RECORD} is no record of learning rates ({error}): give another folder") from None


def grid_of(recipe: Recipe, methods: str | None = None, rates: str | None = None, seeds: str | None = None) -> Grid:
    """Read comma-separated lists, such as "dense,gast", "5e-4,1e-3" and "0,1"; defaults are the recipe's values.

    The default rates are a quarter, half, once, twice and four times the recipe's rate.

    Raises:
        RecipeError: A list is empty, repeats a value, or has an invalid one.
    """

    def method(word: str) -> str:
        if word not in METHODS:
            close = nearest(word, METHODS)
            guess = f"did you mean {close}?" if close else f"choose from {', '.join(METHODS)}"
            raise RecipeError(f"--methods names {word!r}, which is unknown; {guess}")
        return word

    def rate(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise RecipeError(f"--rates has {word!r}, but rates are finite numbers above 0, such as 5e-4,1e-3")
        return value

    def seed(word: str) -> int:
        if not word.isdecimal() or int(word) >= 2**32:
            raise RecipeError(f"--seeds has {word!r}, but seeds are whole numbers from 0 to 4294967295")
        return int(word)

    return Grid(
        methods=(recipe.method,) if methods is None else _parsed("methods", methods, method),
        rates=tuple(
            sorted([rate_of(recipe) * f for f in _FACTORS] if rates is None else _parsed("rates", rates, rate))
        ),
        seeds=(recipe.seed,) if seeds is None else _parsed("seeds", seeds, seed),
    )


def _parsed(name: str, text: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise RecipeError(f"--{name} is empty: give at least one value, separated by commas")
    values = tuple(map(parse, words))
    if len({*values}) < len(values):
        raise RecipeError(f"--{name} repeats a value: leave it out")
    return values


def recipes_of(recipe: Recipe, methods: Sequence[str]) -> dict[str, Recipe]:
    """Checked recipe of each method of a sweep, by method.

    Options of one method are reset in the recipes of the others. Options of methods outside the sweep are refused, as
    in training.

    Raises:
        RecipeError: There are no held-out rows, or a method cannot run with the recipe.
    """
    if recipe.resume:
        raise RecipeError("a sweep resumes by itself: give its folder with --out, and leave resume out")
    if recipe.train and not holds_out(recipe):
        raise RecipeError("no held-out rows to compare rates on: give --eval FILE or --eval-share 0.05")
    if recipe.dp_epsilon is not None:
        raise RecipeError(
            "a sweep trains on the rows once for every rate, and ε of one run does not cover the choice between them: "
            "leave dp_epsilon out, on rows that need no protection"
        )
    parts = {part for method in methods for part in METHODS[method].parts}
    recipes = {}
    for method in methods:
        others: dict[str, Any] = {part.settings.group: part.settings() for part in parts - {*METHODS[method].parts}}
        recipes[method] = replace(recipe, method=method, out=None, **others)
        check(recipes[method])
    return recipes


def facts_of(recipe: Recipe, recipes: dict[str, Recipe]) -> dict[str, Any]:
    """Settings that the results of a sweep depend on, by name: those of `recipe`, and the options of each method."""
    values = recipe_values(anchored(recipe))
    facts = {name: value for name, value in values.items() if name not in _FREE and not isinstance(value, dict)}
    for one in recipes.values():
        facts |= {f"{part.group}.{name}": value for part in settings_of(one) for name, value in part.to_dict().items()}
    return facts


def rate_text(rate: float) -> str:
    """Write a rate as people do, and so that it reads back as it was.

    Example:
        >>> rate_text(0.00025), rate_text(0.1)
        ('2.5e-4', '1e-1')
    """
    mantissa, _, exponent = f"{rate:.15e}".partition("e")
    shown = f"{float(mantissa):g}e{int(exponent)}"
    return shown if float(shown) == rate else repr(rate)
