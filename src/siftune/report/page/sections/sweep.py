"""The owner's trade-off: like gradients against how much of the model is given away."""

from collections.abc import Mapping
from typing import Any

from siftune.base.errors import InputError
from siftune.base.jsonable import finite
from siftune.report.page.figure import slug
from siftune.report.page.points import Point, Scale, scatter
from siftune.report.page.section import Cell, Grid, Section
from siftune.report.page.subjects import STRANGE, Other
from siftune.report.page.words import cut, short

_NUMBERED = 40  # points that are drawn


def in_a_sentence(record: Mapping[str, Any]) -> str:
    """What the sweep compared."""
    given = record.get("points")
    points: list[Any] = given if isinstance(given, list) else []
    front = sum(bool(point.get("front")) for point in points if isinstance(point, dict))
    return f"{len(points)} emulators were compared; {front} of them are not beaten in both likeness and loss gap."


def sweep(other: Other) -> Section:
    """Cosine over loss gap, and the figures of every emulator."""
    try:
        points = [_Emulator(point) for point in other.content["points"]]
    except STRANGE as error:
        raise InputError(f"{other.path / 'sweep.json'} is no sweep ({error!r}): run siftune sweep again") from error
    kinds = list(dict.fromkeys(point.method for point in points))
    known = [(p, p.cosine) for p in points if p.cosine is not None][:_NUMBERED]
    drawn = [Point(p.label, cosine, x=p.gap, colour=kinds.index(p.method)) for p, cosine in known]
    front = sorted((Point(p.label, cosine, x=p.gap) for p, cosine in known if p.front), key=lambda point: point.x)
    words = [
        in_a_sentence(other.content),
        "Cosine: between the outer layers' gradients on the base and on the emulator; 1 is tuning as on the base. Gap: "
        "how much worse the emulator is than the base, in nats per label token; the wider, the less it is worth alone. "
        "A wide gap proves no privacy.",
    ]
    figure = scatter(
        f"trade-off-{slug(other.name)}", "The owner's trade-off", drawn,
        ("loss gap, nats per token", Scale("cosine of gradients")),
        "Up and right is better; the line joins those that are not beaten in both.",
        "full", front,
    )  # fmt: skip
    return Section(
        f"sweep-{slug(other.name)}", f"Sweep {other.name}", words, [figure] if drawn else [], [_table(points)]
    )


class _Emulator:
    """A point of a sweep, from a file that may be a stranger's."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.method, self.keep = str(record["method"]), finite(record["keep"])
        self.basis, self.mlp = (str(record[name] or "") for name in ("basis", "mlp"))
        self.lambdas = finite(record["lambda_attn"]), finite(record["lambda_mlp"])
        self.cosine = None if record["cosine"] is None else finite(record["cosine"])
        self.gap, self.kept, self.front = finite(record["gap"]), finite(record["kept"]), bool(record.get("front"))
        told = record["told"]["value"]
        self.told = None if told is None else finite(told)

    @property
    def label(self) -> str:
        """What stands beside the point."""
        parts = [self.method, self.basis, f"{100 * self.keep:g} %"]
        parts += [f"λ {self.lambdas[0]:g}/{self.lambdas[1]:g}"] if any(self.lambdas) else []
        return cut(" ".join(filter(None, parts)), 40)


def _table(points: list[_Emulator]) -> Grid:
    header = ["method", "basis", "MLP", "keep", "kept", "λ attn", "λ MLP", "cosine", "gap", "told", "unbeaten"]
    rows = [
        [
            Cell(p.method), Cell(p.basis), Cell(p.mlp), Cell(f"{p.keep:g}", p.keep), Cell(short(p.kept), p.kept),
            Cell(f"{p.lambdas[0]:g}", p.lambdas[0]), Cell(f"{p.lambdas[1]:g}", p.lambdas[1]),
            Cell(short(p.cosine), p.cosine), Cell(short(p.gap), p.gap), Cell(short(p.told), p.told),
            Cell("yes" if p.front else ""),
        ]
        for p in points
    ]  # fmt: skip
    caption = "Told: AUC in telling the calibration rows from others; 0.5 is guessing."
    return Grid(header, rows, caption, (0, 1, 2, 10))
