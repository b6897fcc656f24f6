"""Try the model that a stranger's config describes, without memory: what fails later shall fail here, in words."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import brief

_TOKENS = 2  # in the row that is tried


def try_model(model: PreTrainedModel, name: str) -> None:
    """Run a model from `build` once on the meta device, and its rotary embeddings with numbers; it is spent afterwards.

    Its buffers are limited already; `name` is the file that it is built of, for messages.

    Raises:
        KitError: Shapes do not fit each other, or a position's angles are not finite.
    """
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    try:
        angles = [angle for module in rotary for angle in _angles(module)]
        for module in rotary:
            module.rope_type = _plain(module.rope_type)  # others look at the positions, which have no numbers here
        model.float().train()  # not all of it was built in the same dtype
        ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
        with torch.no_grad():
            model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids, use_cache=True)
    except Exception as error:  # transformers runs on a stranger's values
        raise KitError(f"{name}: the model of it cannot run ({brief(error)})") from error
    if not all(bool(angle.isfinite().all()) for angle in angles):
        raise KitError(f"{name}: rope_parameters make angles that are not finite")


def _plain(kind: Any) -> Any:
    return dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"


def _angles(module: nn.Module) -> list[torch.Tensor]:
    """Cosines and sines of the first position and of one past the last, which some kinds treat otherwise."""
    config: Any = module.config
    with torch.device("cpu"):
        real: Any = type(module)(config=config)
        places = torch.tensor([[0, config.max_position_embeddings]])
        kinds = real.rope_type if isinstance(real.rope_type, dict) else (None,)
        wanted = [{} if kind is None else {"layer_type": kind} for kind in kinds]
        return [angle for kind in wanted for angle in real(torch.zeros(1), places, **kind)]
