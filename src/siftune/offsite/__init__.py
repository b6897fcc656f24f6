"""Offsite-tuning: compress a model's middle into an emulator, hand it out as a kit, take back tuned outer layers.

The folders, each built on those before: maths, emulator, kit, exchange, audits (in the plural, since a package `audit`
would replace the function `siftune.offsite.audit` once it is imported), report and cli. Nothing outside of them imports
them: tables of `siftune.cli` name the commands, and the module by which other commands take kits.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siftune.offsite.audits.audit import audit
    from siftune.offsite.emulator.plan import EmulatorSettings
    from siftune.offsite.exchange.emulate import emulate
    from siftune.offsite.exchange.load import load_emulator
    from siftune.offsite.exchange.plug import plug_in

# name -> module; imported on first use
_LAZY = {
    "EmulatorSettings": "siftune.offsite.emulator.plan",
    "audit": "siftune.offsite.audits.audit",
    "emulate": "siftune.offsite.exchange.emulate",
    "load_emulator": "siftune.offsite.exchange.load",
    "plug_in": "siftune.offsite.exchange.plug",
}

__all__ = ["EmulatorSettings", "audit", "emulate", "load_emulator", "plug_in"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'siftune.offsite' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
