"""The tables of `offsite.py`: emulators of one kept fraction side by side."""

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np

from siftune.evaluate.intervals import Bootstrap, Estimate, resample

Line = dict[str, Any]


def report(lines: Sequence[Line]) -> str:
    """Markdown tables, one for every kept fraction; questions of all seeds pooled."""
    bases = {line["job"]["seed"]: line for line in lines if line["job"]["emulator"] is None and line["scores"]}
    rest = [line for line in lines if line["job"]["emulator"] is not None]
    out = _bases(bases)
    for keep in sorted({line["job"]["keep"] for line in rest}, reverse=True):
        names = list(dict.fromkeys(line["job"]["name"] for line in rest if line["job"]["keep"] == keep))
        out += ["", f"**Kept: {keep:.0%} of the middle's matrices**", "", *_head(bool(bases))]
        for name in names:
            found = [line for line in rest if line["job"]["keep"] == keep and line["job"]["name"] == name]
            out.append(_row(name, found, bases))
    return "\n".join(out)


def _bases(bases: dict[int, Line]) -> list[str]:
    if not bases:
        return []
    columns = _pooled(bases.values(), ("full_zs", "full_ft"))
    before, after = (_percent(np.mean(columns[name])) for name in ("full_zs", "full_ft"))
    losses = [mean(line["scores"][name]["nll"] for line in bases.values()) for name in ("full_zs", "full_ft")]
    return [
        f"Base: {before} of the questions right, {after} after tuning the same layers (nats per label "
        f"{losses[0]:.3f} and {losses[1]:.3f}); seeds {', '.join(map(str, sorted(bases)))}."
    ]


def _head(tuned: bool) -> list[str]:
    names = ["emulator", "cosine", "on the task", "loss", "gap"]
    names += ["emulator", "tuned", "plug-in", "Δ", "share of the gain", "of the gain in nats"] if tuned else []
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _row(name: str, lines: Sequence[Line], bases: dict[int, Line]) -> str:
    text = lines[0]["text"]
    cells = [name, f"{text['overall']:.3f}"]
    cells.append(f"{mean(line['task']['overall'] for line in lines):.3f}" if "task" in lines[0] else "")
    cells += [f"{text['loss_emulator']:.2f}", f"{text['loss_emulator'] - text['loss_full']:+.2f}"]
    tuned = [line for line in lines if line["scores"] and line["job"]["seed"] in bases]
    if tuned:
        cells += _tuned(tuned, [bases[line["job"]["seed"]] for line in tuned])
    return "| " + " | ".join(cells) + " |"


def _tuned(lines: Sequence[Line], bases: Sequence[Line]) -> list[str]:
    """Scores before and after tuning, and what follows from them."""
    columns = _pooled(lines, ("emulator_zs", "emulator_ft", "plug_in"))
    columns |= _pooled(bases, ("full_zs", "full_ft"))
    means = resample(columns, None, Bootstrap(4000))
    cells = [_percent(means.point[name]) for name in ("emulator_zs", "emulator_ft", "plug_in")]
    cells.append(_interval(means.difference("plug_in", "emulator_ft"), 100))
    cells.append(_interval(means.share("plug_in", "full_zs", "full_ft"), 100))
    nll = {name: [line["scores"][name]["nll"] for line in rows] for rows, names in (
        (lines, ("plug_in",)), (bases, ("full_zs", "full_ft"))) for name in names}  # fmt: skip
    shares = [(z - p) / (z - f) for z, p, f in zip(nll["full_zs"], nll["plug_in"], nll["full_ft"], strict=True)]
    return [*cells, f"{100 * mean(shares):.1f} %"]


def _pooled(lines: Iterable[Line], names: Sequence[str]) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Right or wrong, question by question, the seeds one after the other."""
    kept = list(lines)
    return {n: np.concatenate([np.array(x["scores"][n]["rows"]["correct"], float) for x in kept]) for n in names}


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f} %"


def _interval(estimate: Estimate, factor: float) -> str:
    if estimate.value is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{factor * estimate.value:+.1f}"
    return f"{factor * estimate.value:+.1f} ({factor * estimate.low:+.1f} to {factor * estimate.high:+.1f})"
