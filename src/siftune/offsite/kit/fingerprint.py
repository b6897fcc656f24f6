"""A name for a base model's weights, to tell whether a kit was made from this model."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import KitError
from siftune.models.streamed import tensor_of

_CHUNK = 1 << 22  # values that are hashed at a time


def fingerprint(model: nn.Module) -> str:
    """SHA-256 in hexadecimal that names a base model's weights, held in float32 or in the checkpoint's bfloat16 alike.

    Hashed are, in the order of the names, every tensor's name, shape, and values in float32; a tensor that is tied to
    another counts once. One piece of a tensor is converted at a time. The model is without PEFT or other wrappers.

    Raises:
        KitError: A weight has no values: it is on the meta device, and accelerate does not know it either.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    digest = hashlib.sha256()
    for name in sorted(model.state_dict().keys() - set(tied)):
        _add(digest, name, tensor_of(model, name))
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise KitError(f"{name} of the model has no values; load the model with its weights")
    digest.update(json.dumps([name, list(tensor.shape)]).encode())
    for piece in torch.split(tensor.reshape(-1), _CHUNK):
        digest.update(piece.to("cpu", torch.float32).numpy().astype("<f4", copy=False).data)
