"""Adapter types in one table: description, accepted settings, and the function that makes PEFT's config.

A new type is an entry of ADAPTER_TYPES and a function that makes its config. Nothing here imports torch, so that
`siftune --help` stays quick.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pkgutil import resolve_name
from typing import Any

from siftune.base.errors import AdapterError


@dataclass(frozen=True)
class Shape:
    """Settings of an adapter; a type accepts some of them."""

    rank: int | None = None  # rank of matrices, or width of a bottleneck; None: the type's default
    # numerator of the response's scale, alpha/rank for most types; None: the type's default
    alpha: int | None = None
    dropout: float = 0.0  # probability of zeroing an input, in [0, 1)
    # names of the modules to adapt; of bottlenecks "attention" and "mlp". None: the type's default
    targets: Sequence[str] | None = None
    layers: Sequence[int] | None = None  # numbers of the decoder layers that get adapters; None: all


@dataclass(frozen=True)
class AdapterType:
    """An adapter type, as `--adapter` names it."""

    line: str  # description
    config: str  # function from a model and a `Shape` to PEFT's config, as MODULE:FUNCTION; imported when called
    # values by key that identify the type in an adapter_config.json; a missing key counts as False
    marks: Mapping[str, Any]
    keys: Mapping[str, str]  # accepted fields of a `Shape` except targets and layers -> key in adapter_config.json
    rank: int = 32  # default
    alpha: Callable[[int], int] = field(default=lambda rank: 2 * rank)  # default, from the rank
    unmergeable: str | None = None  # reason why it cannot be merged into the base's weights; None: it can be

    def make(self, model: Any, shape: Shape) -> Any:
        """Make PEFT's config for a model."""
        return resolve_name(self.config)(model, shape)


_LORA = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_BOTTLENECK = {"rank": "r", "alpha": "alpha", "dropout": "dropout"}
_NON_LINEAR = "a non-linearity is between its two matrices, so that no weight does the same; use it beside its base"

ADAPTER_TYPES = {
    "lora": AdapterType(
        "two thin matrices beside every linear module (arXiv 2106.09685)",
        "siftune.models.adapters.configs:lora",
        {"peft_type": "LORA", "use_rslora": False, "use_dora": False},
        _LORA,
    ),
    "rslora": AdapterType(
        "LoRA whose scale falls with √rank (arXiv 2312.03732)",
        "siftune.models.adapters.configs:rslora",
        {"peft_type": "LORA", "use_rslora": True, "use_dora": False},
        _LORA,
        alpha=lambda _: 16,
    ),
    "dora": AdapterType(
        "LoRA on the direction, and a separate magnitude (arXiv 2402.09353)",
        "siftune.models.adapters.configs:dora",
        {"peft_type": "LORA", "use_dora": True},
        _LORA,
    ),
    "series": AdapterType(
        "a bottleneck after attention and after the MLP (arXiv 1902.00751)",
        "siftune.models.adapters.bottleneck:series",
        {"peft_type": "BOTTLENECK", "parallel": False},
        _BOTTLENECK,
        rank=256,
        alpha=lambda rank: rank,
        unmergeable=_NON_LINEAR,
    ),
    "parallel": AdapterType(
        "a scaled bottleneck beside the MLP (arXiv 2110.04366)",
        "siftune.models.adapters.bottleneck:parallel",
        {"peft_type": "BOTTLENECK", "parallel": True},
        _BOTTLENECK,
        rank=256,
        alpha=lambda rank: 4 * rank,
        unmergeable=_NON_LINEAR,
    ),
    "ia3": AdapterType(
        "vectors that scale keys, values and the input of the MLP's last module (arXiv 2205.05638)",
        "siftune.models.adapters.configs:ia3",
        {"peft_type": "IA3"},
        {},
    ),
    "ln": AdapterType(
        "the norms' own weights, in float32 (arXiv 2312.11420)",
        "siftune.models.adapters.configs:ln",
        {"peft_type": "LN_TUNING"},
        {},
    ),
}


def adapter_type_of(config: Mapping[str, Any]) -> str | None:
    """Identify an adapter's type by its adapter_config.json; None if it is not in the table.

    Example:
        >>> adapter_type_of({"peft_type": "LORA", "use_dora": True, "r": 8})
        'dora'
    """
    for name, adapter_type in ADAPTER_TYPES.items():
        if all(config.get(key, False) == value for key, value in adapter_type.marks.items()):
            return name
    return None


def filled_in(kind: str, shape: Shape) -> Shape:
    """Return a shape with the type's default rank and alpha instead of None.

    Raises:
        AdapterError: There is no such type, or it does not accept a setting of the shape.
    """
    if kind not in ADAPTER_TYPES:
        raise AdapterError(f"unknown adapter type {kind!r}; known: {', '.join(ADAPTER_TYPES)}")
    for sentence in not_taken(kind, shape):
        raise AdapterError(sentence)
    adapter_type = ADAPTER_TYPES[kind]
    rank = adapter_type.rank if shape.rank is None else shape.rank
    alpha = adapter_type.alpha(rank) if shape.alpha is None else shape.alpha
    own = {name: value for name, value in (("rank", rank), ("alpha", alpha)) if name in adapter_type.keys}
    return Shape(**{each.name: getattr(shape, each.name) for each in fields(Shape)} | own)


def not_taken(kind: str, shape: Any) -> Iterator[str]:
    """Yield a sentence for each setting of a `Shape`, or of an object with its fields, that a type does not accept."""
    for each in fields(Shape):
        value = getattr(shape, each.name)
        if each.name not in (*ADAPTER_TYPES[kind].keys, "targets", "layers") and value != each.default:
            others = ", ".join(name for name, other in ADAPTER_TYPES.items() if each.name in other.keys)
            yield (
                f"{each.name} is {value}, which an adapter {kind} does not have: leave {each.name} out, or take an "
                f"adapter that has it ({others})"
            )
