"""A sweep of emulators: sweep.json, sweep.md, and a section of a page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siftune.base.errors import InputError
from siftune.base.text import finite, jsonable
from siftune.evaluate.bootstrap import Estimate
from siftune.offsite.audits.sweep import SweepPoint, front
from siftune.report.audit import shown
from siftune.report.charts import Point, Scale, scatter
from siftune.report.parts import Section, grid_of, slug
from siftune.report.subjects import UNREADABLE, Other
from siftune.report.table import Table, markdown_table
from siftune.report.words import cut

_MEANINGS = """\
*middle*: parameters of the emulator's middle layers as a share of the base's. *cosine*: between the gradients of the
outer layers on the base and on the emulator; at 1, tuning on either is the same. *gap*: loss of the emulator minus loss
of the base, in nats per label token on held-out rows. With a wide gap, the emulator is worth little without the base.
*calibration AUC*: how well an attacker with the base tells the calibration rows from held-out ones (0.5 is guessing),
by the strongest of the attacks on attention, on the MLPs, and on both. An emulator marked *\\** is on the Pareto front:
no other has a higher cosine and a wider gap."""

_CAVEAT = """\
A wide gap proves no privacy: `siftune audit` measures how much a data owner can recover. Neither does a calibration AUC
near 0.5: an attacker with a second kit, of the same settings and other rows, does better."""

_MOST = 1000  # points of an untrusted file
_MOST_DRAWN = 40


def write_sweep(points: Sequence[SweepPoint], folder: Path, facts: Mapping[str, Any]) -> None:
    """Write sweep.json and sweep.md; `facts` are the conditions besides the grid, as JSON can hold them."""
    record = json.dumps(to_dict(points, facts), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = f"# Emulators to choose from\n\n{markdown_table(table(points))}\n\n{base_loss(points)}\n\n"
    (folder / "sweep.json").write_text(record, encoding="utf-8")
    (folder / "sweep.md").write_text(f"{page}{_MEANINGS}\n\n{_CAVEAT}\n", encoding="utf-8")


def to_dict(points: Sequence[SweepPoint], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep in plain types; a cosine that is not defined is None."""
    best = front(points)
    entries = [{**jsonable(p), "gap": p.gap, "front": p in best} for p in ordered(points)]
    return {**facts, "points": entries}


def ordered(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Large emulators first; those of one size by their cosine."""
    return sorted(points, key=lambda p: (-p.keep, math.isnan(p.cosine), -p.cosine))


def table(points: Sequence[SweepPoint]) -> Table:
    """A line for each emulator; those on the Pareto front are marked."""
    best = front(points)
    header = ["method", "basis", "MLP", "keep", "middle", "λ attn", "λ MLP", "parameters", "cosine", "loss", "gap"]
    rows = []
    for p in ordered(points):
        has_lambda = p.basis is not None
        cells = [p.method, p.basis or "", p.mlp or "", f"{p.keep:g}", f"{p.middle_share:.3f}"]
        cells += [f"{p.lambda_attn:g}" if has_lambda else "", f"{p.lambda_mlp:g}" if has_lambda else ""]
        cells += [
            f"{p.parameters / 1e6:.1f} M",
            "–" if math.isnan(p.cosine) else f"{p.cosine:.3f}",
            f"{p.loss:.3f}",
            f"{p.gap:+.3f}",
        ]
        rows.append([*cells, shown(p.calibration_auc), "*" if p in best else ""])
    return Table([*header, "calibration AUC", ""], rows, words=(0, 1, 2, 12))


def base_loss(points: Sequence[SweepPoint]) -> str:
    """The loss of the base, as text."""
    return f"The loss of the base is {points[0].loss_full:.3f}."


def sentence(record: Mapping[str, Any]) -> str:
    """The result of a sweep in a sentence."""
    points = record.get("points")
    entries: list[Any] = points if isinstance(points, list) else []
    best = sum(bool(point.get("front")) for point in entries if isinstance(point, dict))
    return f"Of {len(entries)} emulators, {best} are on the Pareto front of cosine and loss gap."


def section(other: Other) -> Section:
    """Cosine against loss gap, and the table."""
    try:
        points = [_point(record) for record in other.content["points"][:_MOST]]
        grid = grid_of(table(points))
    except UNREADABLE as error:
        raise InputError(
            f"{other.path / 'sweep.json'} is no sweep ({error!r}): run siftune compare-emulators again"
        ) from error
    kinds, best = list(dict.fromkeys(p.method for p in points)), front(points)
    named = {p: Point(_label(p), p.cosine, x=p.gap, colour=kinds.index(p.method)) for p in points}
    drawn = [named[p] for p in points if not math.isnan(p.cosine)][:_MOST_DRAWN]
    figure = scatter(
        "Trade-off of the model owner", drawn,
        ("loss gap, nats per token", Scale("cosine of gradients")),
        "Up and to the right is better. The line is the Pareto front.",
        "full", [named[p] for p in best],
    )  # fmt: skip
    words = [
        sentence(other.content),
        "Cosine: between the gradients of the outer layers on the base and on the emulator; at 1, tuning on either is "
        "the same. Gap: loss of the emulator minus loss of the base, in nats per label token. With a wide gap, the "
        "emulator is worth little without the base. A wide gap proves no privacy.",
        "Calibration AUC: how well an attacker with the base tells the calibration rows from others; 0.5 is guessing.",
        *([base_loss(points)] if points else []),
    ]
    return Section(f"sweep-{slug(other.name)}", f"Sweep {other.name}", words, [figure] if drawn else [], [grid])


def _point(record: Mapping[str, Any]) -> SweepPoint:
    """A point of an untrusted file."""
    auc = record["calibration_auc"]
    basis, mlp = (None if record[name] is None else str(record[name]) for name in ("basis", "mlp"))
    return SweepPoint(
        method=str(record["method"]),
        keep=finite(record["keep"]),
        lambda_attn=finite(record["lambda_attn"]),
        lambda_mlp=finite(record["lambda_mlp"]),
        basis=basis,
        mlp=mlp,
        cosine=math.nan if record["cosine"] is None else finite(record["cosine"]),
        loss=finite(record["loss"]),
        loss_full=finite(record["loss_full"]),
        parameters=int(record["parameters"]),
        middle_share=finite(record["middle_share"]),
        calibration_auc=Estimate(*(None if auc[key] is None else finite(auc[key]) for key in ("value", "low", "high"))),
    )


def _label(p: SweepPoint) -> str:
    parts = [p.method, p.basis, f"{100 * p.keep:g} %"]
    parts += [f"λ {p.lambda_attn:g}/{p.lambda_mlp:g}"] if p.lambda_attn or p.lambda_mlp else []
    return cut(" ".join(filter(None, parts)), 40)
