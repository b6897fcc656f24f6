"""A sweep of emulators as sweep.json and sweep.md."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siftune.base.jsonable import jsonable
from siftune.offsite.audit.sweep import SweepPoint, front
from siftune.report.audit_leaks import shown
from siftune.report.table import Table, markdown_table

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
