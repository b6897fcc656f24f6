"""What every kind of adapter does with every method and on every family: declared here, tried in
tests/invariants/test_carriers.py, and shown in docs/carriers.md, between its marks, by

    PYTHONPATH=tests python -m support.carriers_table
"""

from pathlib import Path
from typing import Any

from peft import PrefixTuningConfig, get_peft_model
from support.adapted import base as plain
from support.adapted import shake
from support.rounded import rounded
from support.tiny import FAMILIES
from torch import nn

from siftune.methods import METHODS
from siftune.models.adapters.attach import attach_adapter
from siftune.models.adapters.full import OpenLayers
from siftune.models.adapters.registry import CARRIERS

PAGE = Path(__file__).parents[2] / "docs" / "carriers.md"
MARKS = ("<!-- from here on: support.carriers_table -->\n", "<!-- to here -->\n")

CLOSED, AGAIN, WORKS = "exact", "again", "works"

# what of a refusal stands in the table, and in the message
TRANSPOSED = "on GPT2LMHeadModel: Target module"
ALLOCATOR = "allots its ranks by the gradients of all layers and rows in every step"
MIXED = "see tokens of all rows mixed together, so samples cannot be told apart in them"
OUTSIDE = "has no parameters of its own in each layer"
PART = "holds a part of the base, so that its response cannot be damped"
PACKED = "reads the shape of the weights, which 4 bits pack"
LOST = "loses the scales of the weights after the first pass on a processor"
UNTRAINED = "which cannot train; load the model unquantised"

ROUNDED = {"4 bits": 4, "8 bits": 8}  # llama, by bitsandbytes
BASES = (*FAMILIES, *ROUNDED)
# kinds of `siftune train` with an option more -> the carrier, and what it is put on or begins with
WITH: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, 4 bits": ("lora", {"family": "4 bits"}),
    "lora, 8 bits": ("lora", {"family": "8 bits"}),
    "lora, pissa": ("lora", {"init": "pissa"}),
    "lora, olora": ("lora", {"init": "olora"}),
    "lora on experts": ("lora", {"family": "mixtral", "targets": ["q_proj", "experts"]}),
}
KINDS = (*CARRIERS, "full", *WITH, "prefix tuning")
COLUMNS = (*METHODS, "dp")
BY_ROW = {"gast", "greats", "trim", "ist+gast", "dp"}


def base(name: str) -> nn.Module:
    """A model without adapters."""
    return rounded(ROUNDED[name]) if name in ROUNDED else plain(name)


def build(kind: str, family: str = "llama") -> nn.Module:
    """A model with an adapter of a kind, which responds."""
    name, more = WITH.get(kind, (kind, {}))
    more = dict(more)
    model = base(more.pop("family", family))
    if kind == "full":
        OpenLayers(model, None)
        return model
    if kind == "prefix tuning":
        return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    rank: dict[str, Any] = {"rank": 4} if "rank" in CARRIERS[name].keys else {}
    return shake(attach_adapter(model, name, **rank, **more)).eval()


def exactly(kind: str, family: str = "llama") -> tuple[nn.Module, float]:
    """A model with an adapter in float64, or in float32 where bitsandbytes has none, and the bound on its gradients."""
    if family in ROUNDED or WITH.get(kind, ("", {}))[1].get("family") in ROUNDED:
        return build(kind, family).train(), 1e-4  # in eval mode its kernels differ with and without gradients
    return build(kind, family).double(), 1e-11


def with_method(kind: str, method: str) -> str:
    """What comes of a kind with a method: a word of the table, or what its refusal says."""
    chooses = method != "dense"
    if kind == "prefix tuning":
        return OUTSIDE if chooses else WORKS
    if kind == "adalora" and chooses:
        return ALLOCATOR
    if kind == "lora on experts" and method in BY_ROW:
        return MIXED
    if kind in ("lora, pissa", "lora, olora") and method in ("ist", "ist+gast"):
        return PART
    if method in BY_ROW:
        return AGAIN if kind in ("vera", "loha", "lokr", "oft", "boft") else CLOSED
    return WORKS


def on_family(kind: str, family: str) -> str:
    """What comes of a kind on a family, with GAST: as above."""
    if family == "gpt2" and kind in ("loha", "lokr", "oft", "boft"):
        return TRANSPOSED
    if kind == "full" and family in ("mixtral", "qwen3_moe"):
        return MIXED
    if kind == "full" and family in ROUNDED:
        return UNTRAINED
    if (kind, family) == ("dora", "8 bits"):
        return LOST
    if kind in ("loha", "lokr") and family == "4 bits":
        return PACKED
    return with_method(kind, "gast")


def tables() -> str:
    """Both tables in Markdown, with the refusals below."""
    notes: dict[str, int] = {}

    def cell(words: str) -> str:
        if words in (CLOSED, AGAIN, WORKS):
            return words
        return f"refused {notes.setdefault(words, len(notes) + 1)}"

    def table(columns: tuple[str, ...], verdict: Any, kinds: tuple[str, ...]) -> list[str]:
        rows = [[f"`{kind}`", *(cell(verdict(kind, column)) for column in columns)] for kind in kinds]
        return ["| " + " | ".join(row) + " |" for row in (["", *columns], ["---"] * (len(columns) + 1), *rows)]

    one = table(COLUMNS, with_method, KINDS)
    two = table(BASES, on_family, (*CARRIERS, "full"))
    below = [f"{number}. … {words} …" for words, number in notes.items()]
    return "\n".join([*one, "", *two, "", *below, ""])


def shown() -> str:
    """What stands between the marks of the page."""
    first, last = MARKS
    return PAGE.read_text(encoding="utf-8").partition(first)[2].partition(last)[0].strip() + "\n"


if __name__ == "__main__":
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    PAGE.write_text(f"{head}{MARKS[0]}\n{tables()}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
