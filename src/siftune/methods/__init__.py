"""The methods: options of each, its maths, and the callback that applies it to training.

A method is a file or folder here and an entry in `METHODS`, from which recipes, flags, help, model cards and the tests
of all methods follow. Nothing in this file imports torch, so that `siftune --help` stays fast.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from siftune.base.settings import Settings
from siftune.methods.options import GASTSettings, ISTSettings, RSTSettings


@dataclass(frozen=True)
class Part:
    """One callback of a method, and its settings."""

    settings: type[Settings]
    callback: str  # class of its callback, as MODULE:NAME; imported on first use
    # it selects rows by a support set, such as a target, until the target's rows begin; else it selects layers
    rows: bool = False
    suppresses: bool = False  # it damps the response of adapters, for which it needs a layer's initial weights
    by_data: bool = False  # its choice depends on the rows, so that noise on gradients does not make it private

    def build(self, settings: Settings, **others: Any) -> Any:
        """Make the callback.

        Args:
            settings: Of its method.
            others: Its further arguments: `seed`, `on_select`, and `support_set` and `select_until` if it selects rows.
        """
        return self.make(**settings.to_dict(), **others)

    def make(self, **options: Any) -> Any:
        """Make the callback from options and further arguments."""
        return resolve_name(self.callback)(**options)


@dataclass(frozen=True)
class Method:
    """A value of `--method`."""

    line: str  # summary for help and model cards
    parts: tuple[Part, ...] = ()  # its callbacks, in their order
    # default peak learning rate (ours): of the rates tried, one that did well on held-out rows (docs/guide.md lists
    # them); that of dense for methods without a sweep
    lr: float = 5e-4


_RST = Part(RSTSettings, "siftune.methods.rst:RST")
_IST = Part(ISTSettings, "siftune.methods.ist.callback:IST", suppresses=True, by_data=True)
_GAST = Part(GASTSettings, "siftune.methods.gast.callback:GAST", rows=True, by_data=True)

METHODS = {
    "dense": Method("all layers follow all rows"),
    "rst": Method("layers drawn at random in every step (IST's ablation)", (_RST,), lr=1e-3),
    "ist": Method("layers drawn by importance in every step (arXiv 2410.11772)", (_IST,), lr=1e-3),
    "gast": Method("every layer follows the rows that align with a support set (arXiv 2603.09865)", (_GAST,)),
    "ist+gast": Method("layers drawn by importance, and per layer the rows that align with it", (_IST, _GAST), lr=1e-3),
}


def all_parts() -> Iterator[Part]:
    """Every part once, in the order of the methods."""
    yield from dict.fromkeys(part for method in METHODS.values() for part in method.parts)
