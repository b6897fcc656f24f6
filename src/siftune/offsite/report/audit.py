"""An audit as audit.json and audit.md."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from siftune.base.errors import RecipeError
from siftune.base.files import writable_folder, write_beside
from siftune.evaluate.bootstrap import Estimate
from siftune.offsite.audits.audit import OwnAudit
from siftune.offsite.audits.gradients import GradientCosine
from siftune.offsite.audits.membership import Attack, Membership
from siftune.offsite.audits.result import LABELS, Audit, RecoveryPoint
from siftune.report.table import Table, markdown_table

_MEASURES = {"accuracy": "by accuracy", "nll": "by log-likelihood"}

_MEANINGS = """\
ZS: nothing tuned. FT: the outer layers tuned on the same rows in the same order. Plug-in: the base with the
outer layers that were tuned on the emulator. Recovered: the emulator with all its decoder layers tuned.

Log-likelihood is per label token, the NLL with the other sign, so that more is better in either column.
Δ = Plug-in − Emulator FT. Gain share = (Plug-in − Full ZS) / (Full FT − Full ZS).
Recovery = (Recovered − Emulator ZS) / (Full FT − Emulator ZS).
A share is not defined if its denominator is not above 0, and has no interval if the denominator's interval is not
above 0. Intervals are bootstrap percentiles over held-out rows, the same draws for all conditions;
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
        title = "# Leakage of training rows by a return"
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
    for field, label in (("gain_share", "gain share"), ("recovery", "recovery")):
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
    rows = [["kept of the middle's parameters", f"{audit.shares.middle:.3f}"]]
    rows += [["kept of all parameters", f"{audit.shares.whole:.3f}"]]
    return markdown_table(Table(["", "figure"], rows))


def _attacks(audit: Audit) -> list[str]:
    """A section for every attack that was tried."""
    sections: list[str] = []
    if audit.recovery:
        sections += ["### Recovery from the complete emulator", recovery_section(audit.recovery)]
    if audit.membership is not None:
        sections += ["### Leakage of training rows by the return", membership_section(audit.membership)]
    return sections


def _cannot_write(folder: Path, error: OSError) -> RecipeError:
    reason = error.strerror or error
    return RecipeError(
        f"the folder {folder} cannot be written to ({reason}); free some space or give another with --out"
    )


NOT_DEFINED = "not defined"

_ATTACK_HEADER = ["", "AUC", "found at 1 % false alarms", "found at 5 %"]


def membership_section(membership: Membership, base: str = "base") -> str:
    """Membership inference on the training rows; `base` names the model of the reference losses."""
    named = {"by loss": membership.loss, f"by loss against the {base}'s": membership.reference}
    if membership.online is not None:
        named["LiRA, online"] = membership.online
    words_on_them = _membership_words(named)
    named[f"blind: the {base}'s loss alone"] = membership.blind
    counts = f"Rows: {membership.members} members, {membership.others} others, {membership.left_out} left out as both"
    shadows = (
        f"{membership.shadows} shadow models" if membership.shadows else "no shadow models were tuned (--shadows N)"
    )
    words = [_attack_table(named), f"{counts}; {shadows}.", words_on_them, _few(membership.loss)]
    if membership.blind.tells_apart:
        words.append(
            f"**Members and others differ by source**: the {base}, which has seen neither, separates them by its "
            "loss. The figures above then say more of the sources than of the training; give held-out rows of the "
            "very source of the training rows."
        )
    return "\n\n".join(filter(None, words))


def recovery_section(points: tuple[RecoveryPoint, ...]) -> str:
    """Recovery by tuning the complete emulator, by learning rate and tokens."""
    rows = [
        [f"{p.lr:g}", f"{p.tokens:,}", shown(p.nll), shown(p.recovery)]
        for p in sorted(points, key=lambda p: (p.lr, p.tokens))
    ]
    table = markdown_table(Table(["learning rate", "tokens", "NLL per token", "recovery"], rows))
    best = min(points, key=lambda p: p.nll.value or 0.0)
    most = max(p.tokens for p in points)
    still = best.tokens == most
    words = f"The least loss came at a learning rate of {best.lr:g} after {best.tokens:,} tokens. " + (
        "It was still falling at the end: more rows or steps may get further." if still else "Longer was no better."
    )
    return f"{table}\n\n{words}"


def shown(estimate: Estimate, percent: bool = False, signed: bool = False) -> str:
    """A figure with its interval in brackets."""
    if estimate.value is None:
        return NOT_DEFINED
    spec = ("+" if signed else "") + (".1f" if percent else ".3f")
    value, *bounds = (
        None if number is None else format(100 * number if percent else number, spec)
        for number in (estimate.value, estimate.low, estimate.high)
    )
    unit = "" if not percent else " points" if signed else " %"
    interval = f" [{bounds[0]}, {bounds[1]}]" if None not in bounds else " [no interval]"
    return f"{value}{unit}{interval}"


def _attack_table(named: Mapping[str, Attack]) -> str:
    rows = [[label, shown(a.auc), _found(a, 0.01), _found(a, 0.05)] for label, a in named.items()]
    return markdown_table(Table(_ATTACK_HEADER, rows))


def _found(attack: Attack, rate: float) -> str:
    estimate = attack.tpr_1 if rate == 0.01 else attack.tpr_5
    return shown(estimate, percent=True) + ("" if attack.resolves(rate) else " (too few others)")


def _few(attack: Attack) -> str:
    """Say what the number of other rows does not resolve."""
    unresolved = [f"{100 * rate:g} %" for rate in (0.01, 0.05) if not attack.resolves(rate)]
    if not unresolved:
        return ""
    return (
        f"{attack.others} others are too few to resolve {' and '.join(unresolved)} false alarms: the share found there "
        "is that without any false alarm, and its interval says little."
    )


def _membership_words(attacks: Mapping[str, Attack]) -> str:
    label = max(attacks, key=lambda name: attacks[name].auc.value or 0.0)
    best = attacks[label]
    assert best.auc.low is not None
    if best.auc.low > 0.5:
        figure = f"{label}, with an AUC of {shown(best.auc)} (0.5 is guessing)"
        return f"Training rows can be distinguished from others: {figure}."
    return (
        f"None of these attacks distinguished training rows from others beyond chance (the best: {label}, AUC "
        f"{shown(best.auc)}); that says nothing of attacks that were not tried."
    )
