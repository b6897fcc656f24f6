"""siftune fine-tunes language models on messy data: a few correct rows of your task show which others to train on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siftune.base.errors import SiftuneError
    from siftune.engine.sharding import shard_base
    from siftune.methods.gast.callback import GAST
    from siftune.methods.ist.callback import IST
    from siftune.methods.keep.callback import Keep
    from siftune.methods.rst import RST
    from siftune.models.adapters.attach import attach_adapter
    from siftune.models.layers import find_layers
    from siftune.sifting.sift import sift

__version__ = "0.1.0"

# name -> module; imported on first use, because torch and transformers take seconds
_LAZY = {
    "GAST": "siftune.methods.gast.callback",
    "IST": "siftune.methods.ist.callback",
    "Keep": "siftune.methods.keep.callback",
    "RST": "siftune.methods.rst",
    "SiftuneError": "siftune.base.errors",
    "attach_adapter": "siftune.models.adapters.attach",
    "find_layers": "siftune.models.layers",
    "shard_base": "siftune.engine.sharding",
    "sift": "siftune.sifting.sift",
}

__all__ = [  # noqa: RUF022
    "GAST",
    "IST",
    "Keep",
    "RST",
    "SiftuneError",
    "attach_adapter",
    "find_layers",
    "shard_base",
    "sift",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'siftune' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
