"""What a return says of its differential privacy: the data owner's word, which nobody else can check.

The keys are those of `methods.dp.accounting.statement`, all of them and no others.
"""

from typing import Any

from siftune.offsite.kit.checks import Check, number, one_of, whole
from siftune.offsite.kit.manifest import MANIFEST
from siftune.offsite.kit.strict import as_object, as_text

KEY = "privacy"
_WHERE = f"{MANIFEST}: {KEY}"


def _version(value: Any, where: str) -> None:
    as_text(value, where, r"[0-9A-Za-z.+-]{1,32}")


_CHECKS: dict[str, Check] = {
    "epsilon": number(0, 1000),
    "delta": number(1e-300, 1 - 1e-9),
    "noise_multiplier": number(1e-6, 1e7),
    "clip": number(1e-12, 1e12),
    "clipping": one_of("layer", "flat"),
    "sampling_rate": number(1e-12, 1),
    "expected_batch": whole(1, 2**31),
    "steps": whole(0, 2**31),
    "accountant": one_of("opacus PRV"),
    "accountant_version": _version,
    "unit": one_of("one training row, there or not"),
}


def check_promise(value: Any) -> dict[str, Any]:
    """Hold a statement on privacy to its keys, types and ranges.

    Raises:
        KitError: With file and field.
    """
    for name, part in as_object(value, _WHERE, tuple(_CHECKS)).items():
        _CHECKS[name](part, f"{_WHERE}.{name}")
    promise: dict[str, Any] = value
    return promise


def in_words(promise: dict[str, Any]) -> str:
    """A statement in a line."""
    return (
        f"ε = {promise['epsilon']:.4g}, δ = {promise['delta']:g} for {promise['unit']}, after {promise['steps']} "
        "steps: the data owner's word"
    )
