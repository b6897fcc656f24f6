"""The tables of `offsite.py`: emulators of one kept fraction side by side."""

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np

from siftune.evaluate.bootstrap import Bootstrap, Estimate, resample
from siftune.report.table import Table, markdown_table

Line = dict[str, Any]

_BASE = ("full_zs", "full_ft")
_AFTER = ("emulator_ft", "plug_in")


def report(lines: Sequence[Line]) -> str:
    """Markdown tables, one for every kept fraction; questions of all seeds pooled."""
    bases = {line["job"]["seed"]: line for line in lines if line["job"]["emulator"] is None and line["scores"]}
    rest = [line for line in lines if line["job"]["emulator"] is not None]
    out = _bases(bases)
    for keep in sorted({line["job"]["keep"] for line in rest}, reverse=True):
        names = list(dict.fromkeys(line["job"]["name"] for line in rest if line["job"]["keep"] == keep))
        rows = []
        for name in names:
            runs = [line for line in rest if line["job"]["keep"] == keep and line["job"]["name"] == name]
            rows.append(_row(name, runs, bases))
        table = markdown_table(Table(_header(bool(bases)), rows))
        out += ["", f"**Kept: {keep:.0%} of the middle's matrices**", "", table]
    return "\n".join(out)


def _bases(bases: dict[int, Line]) -> list[str]:
    if not bases:
        return []
    columns = _pooled(bases.values(), _BASE, "correct")
    before, after = (_percent(np.mean(columns[name])) for name in ("full_zs", "full_ft"))
    losses = [mean(line["scores"][name]["nll"] for line in bases.values()) for name in ("full_zs", "full_ft")]
    return [
        f"Base: {before} of the questions right, {after} after tuning the same layers (nats per label "
        f"{losses[0]:.3f} and {losses[1]:.3f}); seeds {', '.join(map(str, sorted(bases)))}."
    ]


def _header(tuned: bool) -> list[str]:
    names = ["emulator", "cosine", "on the task", "loss", "gap"]
    names += ["tuned: nats", "plug-in: nats", "Δ", "share of the gain, %"] if tuned else []
    names += ["tuned: right", "plug-in: right", "Δ"] if tuned else []
    return names


def _row(name: str, lines: Sequence[Line], bases: dict[int, Line]) -> list[str]:
    text = lines[0]["text"]
    cells = [name, f"{text['overall']:.3f}"]
    cells.append(f"{mean(line['task']['overall'] for line in lines):.3f}" if "task" in lines[0] else "")
    cells += [f"{text['loss_emulator']:.2f}", f"{text['loss_emulator'] - text['loss_full']:+.2f}"]
    tuned = [line for line in lines if line["scores"] and line["job"]["seed"] in bases]
    if tuned:
        cells += _tuned(tuned, [bases[line["job"]["seed"]] for line in tuned])
    return cells


def _tuned(lines: Sequence[Line], bases: Sequence[Line]) -> list[str]:
    """Scores after tuning, and what follows from them; Δ and share are high where the plug-in is good."""
    nats = resample(
        {name: -column for name, column in (_pooled(lines, _AFTER, "nll") | _pooled(bases, _BASE, "nll")).items()},
        _pooled(bases, ("full_zs",), "tokens")["full_zs"],
        Bootstrap(4000),
    )
    right = resample(_pooled(lines, _AFTER, "correct"), None, Bootstrap(4000))
    return [
        *(f"{-nats.point[name]:.3f}" for name in _AFTER),
        _interval(nats.difference("plug_in", "emulator_ft"), 1, "+.3f"),
        _interval(nats.share("plug_in", "full_zs", "full_ft"), 100),
        *(_percent(right.point[name]) for name in _AFTER),
        _interval(right.difference("plug_in", "emulator_ft"), 100),
    ]


def _pooled(lines: Iterable[Line], names: Sequence[str], what: str) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """A score, question by question, the seeds one after the other."""
    runs = list(lines)
    return {n: np.concatenate([np.array(x["scores"][n]["rows"][what], float) for x in runs]) for n in names}


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f} %"


def _interval(estimate: Estimate, factor: float, form: str = "+.1f") -> str:
    if estimate.value is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{factor * estimate.value:{form}}"
    return f"{factor * estimate.value:{form}} ({factor * estimate.low:{form}} to {factor * estimate.high:{form}})"
