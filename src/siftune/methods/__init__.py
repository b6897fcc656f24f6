"""The methods, a room for each: settings, maths, and the callback that brings it into training.

A method is a folder here and an entry in `METHODS`; recipes, flags, help, model cards and the tests of every method
follow from that. Nothing in this file imports torch, so that `siftune --help` stays quick.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from siftune.base.settings import Settings
from siftune.methods.cut.settings import CutSettings
from siftune.methods.gast.settings import GASTSettings
from siftune.methods.greats.settings import GREATSSettings
from siftune.methods.ist.settings import ISTSettings
from siftune.methods.lisa.settings import LISASettings
from siftune.methods.rst.settings import RSTSettings
from siftune.methods.trim.settings import TrimSettings


@dataclass(frozen=True)
class Part:
    """What a method is made of: one callback and its settings."""

    settings: type[Settings]
    callback: str  # class of its callback, as MODULE:NAME; imported when it is built
    rows: bool = False  # it chooses rows; else it chooses layers
    # it damps the response of adapters, and so needs to know a layer's weights before training
    suppresses: bool = False
    # what it chooses depends on what is in the rows, so that noise on gradients does not cover it
    by_data: bool = False

    def build(self, settings: Settings, **others: Any) -> Any:
        """Make the callback; `others` are what it takes besides: `seed`, and `support_set` where it chooses rows."""
        return self.make(**settings.to_dict(), **others)

    def make(self, **options: Any) -> Any:
        """Make the callback from single settings, and what it takes besides."""
        return resolve_name(self.callback)(**options)


@dataclass(frozen=True)
class Method:
    """A way to train, as `--method` names it."""

    line: str  # what it does, for help and model cards
    parts: tuple[Part, ...] = ()  # what it is made of, in the order of the callbacks
    # peak learning rate where none is given (ours): of those that were tried one that did well on held-out rows
    # (docs/guide.md says which were); that of dense where none were
    lr: float = 5e-4


_RST = Part(RSTSettings, "siftune.methods.rst.callback:RST")
_IST = Part(ISTSettings, "siftune.methods.ist.callback:IST", suppresses=True, by_data=True)
_LISA = Part(LISASettings, "siftune.methods.lisa.callback:LISA")
_CUT = Part(CutSettings, "siftune.methods.cut.callback:Cut")
_GAST = Part(GASTSettings, "siftune.methods.gast.callback:GAST", rows=True, by_data=True)
_GREATS = Part(GREATSSettings, "siftune.methods.greats.callback:GREATS", rows=True, by_data=True)
_TRIM = Part(TrimSettings, "siftune.methods.trim.callback:Trim", rows=True, by_data=True)

METHODS = {
    "dense": Method("all layers follow all rows"),
    "rst": Method("layers drawn at random in every step (IST's ablation)", (_RST,), lr=1e-3),
    "ist": Method("layers drawn by their importance in every step (arXiv 2410.11772)", (_IST,), lr=2e-3),
    "lisa": Method("layers drawn at random and held for some steps (arXiv 2403.17919)", (_LISA,)),
    "cut": Method("all layers above a random depth, at which backward ends (ours)", (_CUT,), lr=1e-3),
    "gast": Method("every layer follows the rows whose gradients point its way (arXiv 2603.09865)", (_GAST,)),
    "greats": Method("all layers follow the rows that most help a support set (NeurIPS 2024)", (_GREATS,)),
    "trim": Method("all layers follow the rows of smallest loss, or of largest, or any (arXiv 1810.11874)", (_TRIM,)),
    "ist+gast": Method("layers drawn by importance, and in each the rows that point its way", (_IST, _GAST), lr=2e-3),
}


def all_parts() -> Iterator[Part]:
    """Every part once, in the order in which methods name them."""
    yield from dict.fromkeys(part for method in METHODS.values() for part in method.parts)
