"""An audit as audit.json and audit.md."""

import json
import math
from pathlib import Path

from siftune.base.errors import RecipeError
from siftune.base.files import writable_folder, write_beside
from siftune.offsite.audit.gradients import GradientCosine
from siftune.offsite.audit.own import OwnAudit
from siftune.offsite.audit.result import LABELS, Audit
from siftune.report.audit_leaks import (
    NOT_DEFINED,
    calibration_section,
    membership_section,
    recovery_section,
    shown,
)
from siftune.report.table import Table, markdown_table

_MEASURES = {"accuracy": "by accuracy", "nll": "by log-likelihood"}

_MEANINGS = """\
ZS: nothing tuned. FT: the outer layers tuned on the same rows in the same order. Plug-in: the base with the
outer layers that were tuned on the emulator. Recovered: the emulator with all its decoder layers tuned.
Random weights: the base's architecture, untrained.

Log-likelihood is per label token, the NLL with the other sign, so that more is better in either column.
Δ = Plug-in − Emulator FT. Gain share = (Plug-in − Full ZS) / (Full FT − Full ZS).
CPL = (Emulator ZS − random) / (Full ZS − random). Recovery = (Recovered − Emulator ZS) / (Full FT − Emulator ZS).
A share is not defined where the whole of which it is one is not above 0, and has no interval where the whole's own
interval is not above 0. Intervals are bootstrap percentiles over held-out rows, the same draws for all conditions;
those of an accuracy are Wilson's. They say nothing of how another seed would have tuned."""

_CAVEATS = """\
Δ above 0 says that the data owner does better with the owner's help than without; it proves no privacy. An AUC near 0.5
says that these attacks fail on these rows; stronger ones exist. *Found at 1 % false alarms* is the share of members
that an attack finds while it takes one in a hundred others for a member; guessing finds 1 %."""

_OWN_CAVEAT = """\
The emulator stands in for the model that its owner has: the same attacks on the plugged model may find more or less. An
AUC near 0.5 says that these attacks fail on these rows; stronger ones exist (`--shadows 16` tries one)."""


def write_audit(audit: Audit | OwnAudit, out: str | Path) -> Path:
    """Write an audit to a folder, in the place of one that is there; its files are complete, or not there.

    Raises:
        RecipeError: The folder cannot be written to.
    """
    folder = Path(out)
    record = audit.to_dict(rows=True) if isinstance(audit, Audit) else audit.to_dict()
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {"audit.json": text.encode(), "audit.md": markdown(audit).encode()}
    prepare_folder(folder)
    try:
        with write_beside(*(folder / name for name in contents)) as beside:
            for path, content in zip(beside, contents.values(), strict=True):
                path.write_bytes(content)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder


def prepare_folder(folder: Path) -> None:
    """Make the folder, and see whether it can be written to.

    Raises:
        RecipeError: It cannot.
    """
    try:
        writable_folder(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def markdown(audit: Audit | OwnAudit) -> str:
    """The audit, an owner's of the model or of the rows, as a Markdown page."""
    if isinstance(audit, OwnAudit):
        title = "# What a return tells of the rows that it was tuned on"
        return "\n\n".join([title, membership_section(audit.membership, "emulator"), _OWN_CAVEAT]) + "\n"
    parts = ["# Audit of an offsite-tuning set-up", _facts(audit), _conditions(audit), _comparisons(audit), _MEANINGS]
    parts += ["## What the outer layers' gradients have in common", _cosine(audit.cosine)]
    parts += ["## What is given away", _given_away(audit), *_attacks(audit), _CAVEATS]
    return "\n\n".join(parts) + "\n"


def _facts(audit: Audit) -> str:
    facts, settings = audit.facts, audit.settings
    named = "".join(f"{label} `{facts[key]}`, " for key, label in (("model", "base"), ("kit", "kit")) if key in facts)
    source = "the emulator's outer layers are a return" if facts["returned"] else "all outer layers tuned here"
    return (
        f"{named}{facts['tuned_rows']} rows to tune on, {facts['held_out_rows']} held-out rows; {settings.steps} steps "
        f"of {settings.batch_size} rows at a learning rate of {settings.lr:g}, seed {settings.seed}; {source}. "
        f"Intervals: {100 * settings.level:g} %."
    )


def _conditions(audit: Audit) -> str:
    accuracy = audit.accuracy and audit.accuracy.replace("_", " ")
    header, rows = ["condition", "NLL per token", *([accuracy] if accuracy else [])], []
    for name, label in LABELS.items():
        if name in audit.conditions:
            one = audit.conditions[name]
            rows.append([label, shown(one.nll), *([shown(one.accuracy, percent=True)] if one.accuracy else [])])
    return markdown_table(Table(header, rows))


def _comparisons(audit: Audit) -> str:
    measures = [name for name in _MEASURES if name in audit.comparisons]
    header = ["", *(_MEASURES[name] for name in measures)]
    rows = [["Δ", *(shown(audit.comparisons[name].delta, name == "accuracy", signed=True) for name in measures)]]
    for field, label in (("gain_share", "gain share"), ("cpl", "CPL"), ("recovery", "recovery")):
        estimates = [getattr(audit.comparisons[name], field) for name in measures]
        if None not in estimates:  # recovery was not tried
            rows.append([label, *map(shown, estimates)])
    return markdown_table(Table(header, rows))


def _cosine(cosine: GradientCosine) -> str:
    pairs = [*zip(cosine.layers, cosine.per_layer, strict=True), ("all", cosine.overall)]
    rows = [[layer, NOT_DEFINED if math.isnan(value) else f"{value:.3f}"] for layer, value in pairs]
    losses = f"Loss per label token on these rows: base {cosine.loss_full:.3f}, emulator {cosine.loss_emulator:.3f}."
    return f"{markdown_table(Table(['outer layer', 'cosine'], rows))}\n\n{losses}"


def _given_away(audit: Audit) -> str:
    rows = [["kept of the middle's parameters", f"{audit.kept.middle:.3f}"]]
    rows += [["kept of all parameters", f"{audit.kept.whole:.3f}"]]
    return markdown_table(Table(["", "figure"], rows))


def _attacks(audit: Audit) -> list[str]:
    """A section for every attack that was tried."""
    sections: list[str] = []
    if audit.recovery:
        sections += ["### What the whole emulator can be made into", recovery_section(audit.recovery)]
    if audit.membership is not None:
        sections += ["### What the return tells of its rows", membership_section(audit.membership)]
    if audit.calibration is not None:
        sections += ["### What the kit tells of its calibration rows", calibration_section(audit.calibration)]
    return sections


def _cannot_write(folder: Path, error: OSError) -> RecipeError:
    reason = error.strerror or error
    return RecipeError(
        f"the folder {folder} cannot be written to ({reason}); free some space or give another with --out"
    )
