"""A learning-rate sweep on paper: its grid, the recipe of each of its methods, and what a run of it found."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from siftune.base.errors import RecipeError
from siftune.base.settings import nearest
from siftune.methods import METHODS
from siftune.recipe.checks import check
from siftune.recipe.read import anchored
from siftune.recipe.schema import Recipe, differences, holds_out, method_of, rate_of, resolve_recipe

T = TypeVar("T")

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # ours: the default grid around a recipe's rate

# what a sweep varies, and what leaves no mark on its results
_FREE = {
    "method", "lr", "seed", "out", "resume", "save_every", "eval_every", "patience", "log_every", "report_to",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What a sweep tries."""

    methods: tuple[str, ...]
    rates: tuple[float, ...]  # peak learning rates, ascending
    seeds: tuple[int, ...]  # every method is tried at every rate with each

    def cells(self) -> Iterator[tuple[str, float, int]]:
        """Method, rate and seed of every run; one seed after the other, so that an early end leaves whole curves."""
        return ((method, rate, seed) for seed in self.seeds for method in self.methods for rate in self.rates)


@dataclass(frozen=True)
class LRRun:
    """What one run of a sweep found."""

    method: str
    lr: float  # peak learning rate
    seed: int
    heldout_loss: float | None  # of the tuned model, in nats per label token; None where the run diverged, as below
    train_loss: float | None  # the mean over the last tenth of the steps
    steps: int
    seconds: float  # of training and measuring
    diverged: str | None = None  # how it did

    @property
    def cell(self) -> tuple[str, float, int]:
        """Its place in the grid."""
        return self.method, self.lr, self.seed


def grid_of(recipe: Recipe, methods: str | None = None, rates: str | None = None, seeds: str | None = None) -> Grid:
    """Read lists with commas between, such as "dense,gast", "5e-4,1e-3" and "0,1"; what is not given is the recipe's.

    By default a quarter, half, once, twice and four times its rate, or that of its method, are tried.

    Raises:
        RecipeError: A list is empty, names something twice, or names what it cannot.
    """
    given = _listed("rates", rates, _rate) if rates is not None else tuple(rate_of(recipe) * f for f in _FACTORS)
    return Grid(
        methods=_listed("methods", methods, _method) if methods is not None else (recipe.method,),
        rates=tuple(sorted(given)),
        seeds=_listed("seeds", seeds, _seed) if seeds is not None else (recipe.seed,),
    )


def rate_text(rate: float) -> str:
    """Write a rate as people do, and so that it reads back as it was.

    Example:
        >>> rate_text(0.00025), rate_text(0.1)
        ('2.5e-4', '1e-1')
    """
    mantissa, _, exponent = f"{rate:.15e}".partition("e")
    shown = f"{float(mantissa):g}e{int(exponent)}"
    return shown if float(shown) == rate else repr(rate)


def _listed(name: str, text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    """Split a list at its commas, and read every part."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise RecipeError(f"--{name} is empty: give at least one, with commas between several")
    values = [read(word) for word in words]
    for place, value in enumerate(values):
        if value in values[:place]:
            raise RecipeError(f"--{name} names {words[place]} twice: leave one out")
    return tuple(values)


def _method(word: str) -> str:
    if word not in METHODS:
        close = nearest(word, METHODS)
        guess = f"did you mean {close}?" if close else f"known: {', '.join(METHODS)}"
        raise RecipeError(f"--methods names {word!r}, which is unknown; {guess}")
    return word


def _rate(word: str) -> float:
    try:
        rate = float(word)
    except ValueError:
        raise RecipeError(f"--rates names {word!r}, which is no number: give rates such as 5e-4,1e-3") from None
    if not (math.isfinite(rate) and rate > 0):
        raise RecipeError(f"--rates names {word}, but every rate must be a finite number above 0")
    return rate


def _seed(word: str) -> int:
    if not word.isdecimal() or int(word) >= 2**32:
        raise RecipeError(f"--seeds names {word!r}, but every seed must be a whole number from 0 to 4294967295")
    return int(word)


def recipes_of(recipe: Recipe, methods: Sequence[str]) -> dict[str, Recipe]:
    """The recipe of each method of a sweep, checked and resolved; of the given recipe's method nothing is kept.

    Settings of one method stay away from the others, which would refuse them; those of a method that is not in the
    sweep are refused, as in training.

    Raises:
        RecipeError: No held-out rows, or a method cannot run with the recipe.
    """
    if recipe.resume:
        raise RecipeError(
            "resume has no effect on a sweep, which goes on by itself where its folder has some of the runs: give "
            "that folder with --out, and leave resume out"
        )
    if recipe.train and not holds_out(recipe):
        raise RecipeError(
            "no held-out rows: the best rate is the best on rows that are not trained on; give --eval FILE, or "
            "`eval: FILE` in the recipe"
        )
    if recipe.dp_epsilon is not None:
        raise RecipeError(
            "a sweep trains on the rows once for every rate, and ε of one run does not cover the choice between them: "
            "leave dp_epsilon out, on rows that need no protection"
        )
    candidates = {method: replace(recipe, method=method) for method in methods}
    made = {}
    for method, one in candidates.items():
        others = [other for name, other in candidates.items() if name != method]
        made[method] = replace(one, **_not_its_own(one, others))
        check(made[method])
        made[method] = replace(anchored(resolve_recipe(made[method])), out=None)
    return made


def _not_its_own(recipe: Recipe, others: Sequence[Recipe]) -> dict[str, Any]:
    """What a recipe holds for the sweep's other methods and would refuse itself, at its default."""
    parts = {part for other in others for part in method_of(other).parts} - set(method_of(recipe).parts)
    return {part.settings.group: part.settings() for part in parts}


def difference(before: Recipe, now: Recipe) -> tuple[str, Any, Any] | None:
    """The first setting in which two recipes of a sweep would not train alike: its name and both values.

    Rates, seeds and what a run leaves behind may differ; of different methods, their own settings too.
    """
    return next(differences(before, now, _FREE), None)
