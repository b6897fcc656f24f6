"""A sweep of emulators: sweep.json, sweep.md, and the section of a page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siftune.base.errors import InputError
from siftune.base.jsonable import finite, jsonable
from siftune.offsite.audits.sweep import SweepPoint, front
from siftune.report.audit import shown
from siftune.report.charts import Point, Scale, scatter
from siftune.report.parts import Cell, Grid, Section, slug
from siftune.report.subjects import STRANGE, Other
from siftune.report.table import Table, markdown_table
from siftune.report.words import cut, short

_MEANINGS = """\
kept: parameters of the middle that the emulator has, of the base's. cosine: between the outer layers' gradients on
the base and on the emulator; 1 is tuning as on the base. gap: the emulator's loss − the base's, in nats per label
token on held-out rows; the wider, the less the emulator is worth by itself. *: no other emulator here has both a
higher cosine and a wider gap. told: AUC, with its interval, of whoever has the base in telling the calibration rows
from the held-out ones by the emulator (0.5 is guessing); the strongest of the attacks on attention, the MLPs, and both.
"""

_CAVEAT = """\
A wide gap proves no privacy: `siftune audit` tries out what a data owner can recover. Nor does a *told* near 0.5: an
attacker with a second kit, of the same settings and other rows, does better."""


def write_sweep(points: Sequence[SweepPoint], folder: Path, facts: Mapping[str, Any]) -> None:
    """Write table and figures; `facts` is what they depend on besides the grid, as JSON can hold it."""
    record = json.dumps(to_dict(points, facts), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = f"# Emulators to choose from\n\n{table(points)}\n\n{_MEANINGS}\n\n{_CAVEAT}\n"
    (folder / "sweep.json").write_text(record, encoding="utf-8")
    (folder / "sweep.md").write_text(page, encoding="utf-8")


def to_dict(points: Sequence[SweepPoint], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep in plain types; a cosine that is not defined is None."""
    best = front(points)
    entries = [{**jsonable(p), "gap": p.gap, "front": p in best} for p in ordered(points)]
    return {**facts, "points": entries}


def ordered(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Large emulators first, those of one kept fraction by their cosine."""
    return sorted(points, key=lambda p: (-p.keep, math.isnan(p.cosine), -p.cosine))


def table(points: Sequence[SweepPoint]) -> str:
    """The sweep as a Markdown table."""
    best = front(points)
    header = ["method", "basis", "MLP", "keep", "kept", "λ attn", "λ MLP", "parameters", "cosine", "loss", "gap"]
    header += ["told", ""]
    rows = []
    for p in ordered(points):
        has_lambda = p.basis is not None
        cells = [p.method, p.basis or "", p.mlp or "", f"{p.keep:g}", f"{p.kept:.3f}"]
        cells += [f"{p.lambda_attn:g}" if has_lambda else "", f"{p.lambda_mlp:g}" if has_lambda else ""]
        cells += [f"{p.parameters / 1e6:.1f} M", f"{p.cosine:.3f}", f"{p.loss:.3f}", f"{p.gap:+.3f}"]
        rows.append([*cells, shown(p.told), "*" if p in best else ""])
    grid = markdown_table(Table(header, rows, words=(0, 1, 2, 12)))
    return f"{grid}\n\nThe base's loss is {points[0].loss_full:.3f}."


_NUMBERED = 40  # points that are drawn


def sentence(record: Mapping[str, Any]) -> str:
    """What the sweep compared."""
    given = record.get("points")
    points: list[Any] = given if isinstance(given, list) else []
    front = sum(bool(point.get("front")) for point in points if isinstance(point, dict))
    return f"{len(points)} emulators were compared; {front} of them are not beaten in both likeness and loss gap."


def section(other: Other) -> Section:
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
        sentence(other.content),
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
