"""Sections on a kit and on an audit."""

from collections.abc import Iterator, Mapping
from typing import Any

from siftune.base.text import finite
from siftune.offsite.audits.result import LABELS
from siftune.offsite.kit.manifest import EMULATOR, OUTER, Manifest
from siftune.report.charts import Point, Scale, listed_points
from siftune.report.parts import Cell, Figure, Grid, Section, slug
from siftune.report.subjects import UNREADABLE, Other
from siftune.report.words import memory, short


def kit_sentence(manifest: Manifest) -> str:
    """What the kit is."""
    first, last = manifest.split.first, manifest.split.last
    return (
        f"A kit of a {manifest.model_type} with {manifest.depth} layers: {first} and {last} outer layers to tune, "
        f"{len(manifest.middle)} of {manifest.depth - first - last} middle layers in the emulator."
    )


def kit_section(other: Other) -> Section:
    """Ranks and channels per layer."""
    manifest: Manifest = other.content
    size = memory(manifest.files[EMULATOR].bytes / 1e6), memory(manifest.files[OUTER].bytes / 1e6)
    words = [
        kit_sentence(manifest),
        f"The emulator takes {size[0]}, the outer layers {size[1]}. The lower a rank or number of channels, the less "
        "of a matrix is released. The released part is exact.",
    ]
    return Section(f"kit-{slug(other.name)}", f"Kit {other.name}", words, tables=[_middle(manifest)])


def _middle(manifest: Manifest) -> Grid:
    rows = [
        [
            Cell(str(shape.base)),
            Cell("all" if shape.channels is None else f"{shape.channels:,}"),
            Cell(
                ", ".join(f"{name.rpartition('.')[2]} {rank}" for name, rank in dict(shape.ranks).items()) or "complete"
            ),
        ]
        for shape in manifest.middle
    ]
    return Grid(["layer", "MLP channels", "ranks"], rows, "The emulator's middle layers.", (2,))


_ATTACKS = {
    "loss": "by loss",
    "reference": "by loss against the base's",
    "online": "LiRA, online",
    "blind": "blind: the base's loss alone",
}
_GUESSING = 0.5


def audit_sentence(record: Mapping[str, Any]) -> str:
    """What came out."""
    delta = _estimate(_at(record, "comparisons", "nll", "delta"))
    strongest = max(_attacks(record), key=lambda point: point.value, default=None)
    parts = []
    if delta is not None:
        better = "worse" if delta.value < 0 else "better"
        parts.append(
            f"the plugged-in layers do {short(abs(delta.value))} nats per token {better} than the emulator alone"
        )
    if strongest is not None:
        parts.append(f"the strongest attack has an AUC of {short(strongest.value)} (0.5 is guessing)")
    return f"Audit: {'; '.join(parts) or 'no results'}."


def audit_section(other: Other) -> Section:
    """Conditions and attacks."""
    record = other.content
    figures = [*_conditions(record), *_cosines(record), *_attack_figures(record)]
    words = [
        audit_sentence(record),
        "ZS: zero-shot, nothing tuned. FT: the outer layers fine-tuned. Plug-in: the base with the layers tuned on the "
        "emulator. An AUC near 0.5 means that these attacks fail on these rows. Stronger attacks exist.",
    ]
    return Section(f"audit-{slug(other.name)}", f"Audit {other.name}", words, figures)


def _conditions(record: Mapping[str, Any]) -> Iterator[Figure]:
    conditions = _at(record, "conditions") or {}
    for measure, title, scale in (
        ("nll", "Loss of the models", Scale("nats per label token; less is better")),
        ("accuracy", "Accuracy of the models", Scale("share of correct rows", percent=True)),
    ):
        points = [
            Point(label, found.value, found.low, found.high, colour=0 if key.startswith("full") else 1)
            for key, label in LABELS.items()
            if (found := _estimate(_at(conditions, key, measure))) is not None
        ]
        if points:
            yield listed_points(title, points, scale)


def _cosines(record: Mapping[str, Any]) -> Iterator[Figure]:
    layers, values = (_at(record, "cosine", key) for key in ("layers", "per_layer"))
    pairs = [*zip(layers, values, strict=False)] if isinstance(layers, list) and isinstance(values, list) else []
    pairs.append(("all layers", _at(record, "cosine", "overall")))
    points = [Point(str(layer), cosine) for layer, value in pairs if (cosine := _finite(value)) is not None]
    if points:
        note = "Of the outer layers' gradients on the base and on the emulator; at 1, tuning on either is the same."
        yield listed_points("Cosine of gradients", points, Scale("cosine"), note)


def _attack_figures(record: Mapping[str, Any]) -> Iterator[Figure]:
    points = _attacks(record)
    if points:
        scale = Scale("AUC", reference=_GUESSING, reference_name="guessing")
        note = "How well each attack tells training rows from others."
        yield listed_points("Attacks", points, scale, note)


def _attacks(record: Mapping[str, Any]) -> list[Point]:
    """AUC of every attack that was tried: on the return's rows, and on the kit's calibration rows."""
    points = []
    for key, label in _ATTACKS.items():
        found = _estimate(_at(record, "membership", key, "auc"))
        if found is not None:
            points.append(Point(label, found.value, found.low, found.high, colour=5 if key == "blind" else 1))
    for key in _at(record, "calibration", "attacks") or {}:
        found = _estimate(_at(record, "calibration", "attacks", key, "auc"))
        if found is not None:
            points.append(Point(f"calibration, by {key}", found.value, found.low, found.high, colour=2))
    return points


def _at(record: Any, *keys: str) -> Any:
    """The value behind keys; None if any of them is missing or is no mapping."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _estimate(value: Any) -> Point | None:
    """A figure with its interval, as a point without a name; None where there is none."""
    if not isinstance(value, Mapping) or (middle := _finite(value.get("value"))) is None:
        return None
    return Point("", middle, _finite(value.get("low")), _finite(value.get("high")))


def _finite(value: Any) -> float | None:
    try:
        return finite(value)
    except UNREADABLE:
        return None
