"""An audit as one picture: the conditions, the cosines, the attacks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from siftune.evaluate.bootstrap import Estimate
from siftune.offsite.audit.result import EMULATOR_FT, EMULATOR_ZS, FLOOR, LABELS, PLUG_IN, RECOVERED, Audit
from siftune.report.picture import new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BASE, _EMULATOR, _PLUG_IN, _FLOOR = "#4269d0", "#efb118", "#3ca951", "#9498a0"
_COLOURS = {EMULATOR_ZS: _EMULATOR, EMULATOR_FT: _EMULATOR, RECOVERED: _EMULATOR, PLUG_IN: _PLUG_IN, FLOOR: _FLOOR}


def picture(audit: Audit) -> bytes:
    """Draw an audit, as a PNG file."""
    panels = [_nll, *([_accuracy] if audit.accuracy else []), _cosine, *([_membership] if audit.membership else [])]
    figure = new_figure(3.6 * len(panels), 3.6)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, audit)
    return png(figure)


def _nll(axes: "Axes", audit: Audit) -> None:
    _conditions(axes, {name: one.nll for name, one in audit.conditions.items()})
    axes.set_title("NLL per token (less is better)")


def _accuracy(axes: "Axes", audit: Audit) -> None:
    _conditions(axes, {name: one.accuracy for name, one in audit.conditions.items() if one.accuracy})
    axes.set_title(f"{str(audit.accuracy).replace('_', ' ')} (more is better)")
    axes.set_ylim(0, 1)


def _conditions(axes: "Axes", estimates: dict[str, Estimate]) -> None:
    names = [name for name in LABELS if name in estimates]
    colours = [_COLOURS.get(name, _BASE) for name in names]
    _bars(axes, [LABELS[name] for name in names], [estimates[name] for name in names], colours)


def _cosine(axes: "Axes", audit: Audit) -> None:
    cosine = audit.cosine
    values = [Estimate(value) for value in (*cosine.per_layer, cosine.overall)]
    _bars(axes, [*cosine.layers, "all"], values, [_EMULATOR] * len(cosine.layers) + [_BASE])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(min(0.0, *axes.get_ylim()), 1)
    axes.set_title("cosine of outer gradients")


def _membership(axes: "Axes", audit: Audit) -> None:
    assert audit.membership is not None
    found = audit.membership
    named = {"by loss": found.loss, "against base": found.reference, "LiRA": found.online, "blind": found.blind}
    attacks = {label: one.auc for label, one in named.items() if one is not None}
    colours = [_FLOOR if label == "blind" else _PLUG_IN for label in attacks]
    _bars(axes, list(attacks), list(attacks.values()), colours)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1)
    axes.set_title("membership AUC (0.5: guessing)")


def _bars(axes: "Axes", labels: Sequence[str], estimates: Sequence[Estimate], colours: Sequence[str]) -> None:
    """Bars with whiskers where there are intervals."""
    places = range(len(labels))
    values = [float("nan") if one.value is None else one.value for one in estimates]
    axes.bar(places, values, color=list(colours), width=0.7)
    for place, value, one in zip(places, values, estimates, strict=True):
        if one.low is not None and one.high is not None:
            whiskers = [[max(0.0, value - one.low)], [max(0.0, one.high - value)]]
            axes.errorbar([place], [value], yerr=whiskers, color="black", capsize=3, linewidth=1)
    axes.set_xticks(list(places), list(labels), rotation=40, ha="right", rotation_mode="anchor")
