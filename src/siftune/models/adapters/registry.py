"""The kinds of adapters, in one table: what each is, what of a recipe it takes, and which file makes PEFT's config.

A new kind is a line in CARRIERS and a function that makes its config. Nothing here imports torch, so that
`siftune --help` stays quick.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pkgutil import resolve_name
from typing import Any, Literal

from siftune.base.errors import AdapterError

NONLINEARITIES = Literal["relu", "gelu", "silu", "tanh"]


@dataclass(frozen=True)
class Shape:
    """What of an adapter can be chosen; a kind takes some of it."""

    rank: int | None = None  # rank of matrices, or width of a bottleneck; None stands for the kind's own
    # numerator of the response's scale, alpha/rank for most kinds; None stands for the kind's own
    alpha: int | None = None
    dropout: float = 0.0  # probability of zeroing an input, in [0, 1)
    init: str = "default"  # first values: "default", or what PEFT's LoRA takes besides
    # names of the modules to adapt; of bottlenecks "attention" and "mlp". None stands for the kind's own
    targets: Sequence[str] | None = None
    layers: Sequence[int] | None = None  # numbers of the decoder layers that get adapters; None stands for all


@dataclass(frozen=True)
class Carrier:
    """A kind of adapter, as `--adapter` names it."""

    line: str  # what it is
    config: str  # what makes PEFT's config of a model and a `Shape`, as MODULE:FUNCTION; imported when it is called
    # what tells the kind in an adapter_config.json: values by key; a key that is missing there is False
    marks: Mapping[str, Any]
    keys: Mapping[str, str]  # what of a `Shape` it takes, targets and layers apart -> the key in adapter_config.json
    rank: int = 32  # where none is given
    alpha: Callable[[int], int] = field(default=lambda rank: 2 * rank)  # the same, made of the rank
    unmergeable: str | None = None  # why it cannot be put into the base's weights; None where it can

    def make(self, model: Any, shape: Shape) -> Any:
        """Make PEFT's config for a model."""
        return resolve_name(self.config)(model, shape)


_LORA = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "init": "init_lora_weights"}
_BOTTLENECK = {"rank": "r", "alpha": "alpha", "dropout": "dropout"}
_NON_LINEAR = "between its two matrices stands a non-linearity, so that no weight does the same; use it beside its base"

CARRIERS = {
    "lora": Carrier(
        "two thin matrices beside every linear module (arXiv 2106.09685)",
        "siftune.models.adapters.lora:lora",
        {"peft_type": "LORA", "use_rslora": False, "use_dora": False},
        _LORA,
    ),
    "rslora": Carrier(
        "LoRA whose scale falls with √rank (arXiv 2312.03732)",
        "siftune.models.adapters.lora:rslora",
        {"peft_type": "LORA", "use_rslora": True, "use_dora": False},
        _LORA,
        alpha=lambda _: 16,
    ),
    "dora": Carrier(
        "LoRA on the direction, and a magnitude apart (arXiv 2402.09353)",
        "siftune.models.adapters.lora:dora",
        {"peft_type": "LORA", "use_dora": True},
        _LORA,
    ),
    "series": Carrier(
        "a bottleneck after attention and after the MLP (arXiv 1902.00751)",
        "siftune.models.adapters.bottleneck:series",
        {"peft_type": "BOTTLENECK", "parallel": False},
        _BOTTLENECK,
        rank=256,
        alpha=lambda rank: rank,
        unmergeable=_NON_LINEAR,
    ),
    "parallel": Carrier(
        "a scaled bottleneck beside the MLP (arXiv 2110.04366)",
        "siftune.models.adapters.bottleneck:parallel",
        {"peft_type": "BOTTLENECK", "parallel": True},
        _BOTTLENECK,
        rank=256,
        alpha=lambda rank: 4 * rank,
        unmergeable=_NON_LINEAR,
    ),
    "ia3": Carrier(
        "vectors that scale keys, values and what the MLP's last module is given (arXiv 2205.05638)",
        "siftune.models.adapters.ia3:ia3",
        {"peft_type": "IA3"},
        {},
    ),
    "ln": Carrier(
        "the norms' own weights (arXiv 2312.11420)",
        "siftune.models.adapters.norms:ln",
        {"peft_type": "LN_TUNING"},
        {},
    ),
}


def carrier_of(config: Mapping[str, Any]) -> str | None:
    """The kind of an adapter by what its adapter_config.json says; None where it is none of these.

    Example:
        >>> carrier_of({"peft_type": "LORA", "use_dora": True, "r": 8})
        'dora'
    """
    for name, carrier in CARRIERS.items():
        if all(config.get(key, False) == value for key, value in carrier.marks.items()):
            return name
    return None


def filled_in(kind: str, shape: Shape) -> Shape:
    """A shape with the kind's own rank and alpha where it has none.

    Raises:
        AdapterError: There is no such kind, or it does not take what the shape says.
    """
    if kind not in CARRIERS:
        raise AdapterError(f"unknown kind of adapter {kind!r}; known: {', '.join(CARRIERS)}")
    for sentence in not_taken(kind, shape):
        raise AdapterError(sentence)
    carrier = CARRIERS[kind]
    rank = carrier.rank if shape.rank is None else shape.rank
    alpha = carrier.alpha(rank) if shape.alpha is None else shape.alpha
    own = {name: value for name, value in (("rank", rank), ("alpha", alpha)) if name in carrier.keys}
    return Shape(**{each.name: getattr(shape, each.name) for each in fields(Shape)} | own)


def not_taken(kind: str, shape: Any) -> Iterator[str]:
    """Say of everything that a `Shape`, or what has its fields, has and a kind has not what it is, and what to do."""
    for each in fields(Shape):
        value = getattr(shape, each.name, each.default)
        if each.name not in (*CARRIERS[kind].keys, "targets", "layers") and value != each.default:
            others = ", ".join(name for name, carrier in CARRIERS.items() if each.name in carrier.keys)
            yield (
                f"{each.name} is {value}, which an adapter {kind} does not have: leave {each.name} out, or take an "
                f"adapter that has it ({others})"
            )
