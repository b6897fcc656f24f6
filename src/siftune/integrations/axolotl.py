"""Axolotl: the methods as a plugin, with their settings in axolotl's YAML.

plugins: [siftune.integrations.axolotl.SiftunePlugin]
gast: {select: 0.75}
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import create_model

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.integrations.groups import callbacks, keys
from siftune.methods.host.callback import SelectionCallback

_FUSED = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

SiftuneArgs = create_model("SiftuneArgs", **dict.fromkeys(keys(), (Any, None)))  # type: ignore[call-overload]
"""Keys in axolotl's YAML: a group for each method, and `label_logits`."""


class SiftunePlugin(BasePlugin):  # type: ignore[misc]
    """Adds siftune's methods to axolotl's trainers.

    Raises:
        RecipeError: The YAML has no method, or an invalid setting.
        UnsupportedError: Axolotl would bypass siftune's adapters, or put several samples into a row.
    """

    def register(self, cfg: Any) -> None:
        """Check the YAML."""
        empty = [key for key in keys() if key in cfg and cfg[key] is None]
        if empty:
            raise RecipeError(f"{empty[0]} is empty in the YAML: give {empty[0]}: {{}} for its defaults")
        callbacks(cfg)

    def get_input_args(self) -> str:
        """Path of the keys for axolotl."""
        return f"{__name__}.SiftuneArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse incompatible options, once axolotl has filled in its defaults."""
        if not any(isinstance(made, SelectionCallback) for made in callbacks(cfg)):
            return
        fused = [name for name in _FUSED if cfg.get(name)]
        if fused:
            raise UnsupportedError(
                f"{', '.join(fused)} run adapters in kernels of their own, past siftune, so that they would train on "
                f"all rows in every layer: give {', '.join(f'{name}: false' for name in fused)}"
            )
        if cfg.get("sample_packing"):
            raise UnsupportedError(
                "sample_packing puts several samples into one row, so that they cannot be selected one by one: give "
                "sample_packing: false"
            )

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Create the callbacks of a run."""
        return callbacks(cfg)
