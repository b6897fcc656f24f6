"""Two devices on a machine that has none: tensors with a device of their own, which refuse to meet one of another.

Values are held on the processor. What a `device_map` must not do, mix tensors of two devices, raises as on GPUs;
like there, numbers (tensors without dimensions) of the processor go with all, and torch's `_foreach` functions take
tensors of several devices one by one.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

DEVICES = ("meta:0", "meta:1")


class OnDevice(Tensor):
    """A tensor of the processor that stands on another device.

    Args:
        held: Its values.
        device: One of `DEVICES`.
    """

    @staticmethod
    def __new__(cls, held, device):
        like = {"strides": held.stride(), "dtype": held.dtype, "device": device}
        return Tensor._make_wrapper_subclass(cls, held.size(), **like)

    def __init__(self, held, device):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        to = kwargs.pop("device", None)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device for t in given if isinstance(t, OnDevice) or t.ndim}
        each = "_foreach" in str(func)
        if len(devices) > 1 and not each:
            raise RuntimeError(f"{func} is given tensors on {sorted(map(str, devices))}")
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if each:
            return [_put(value, place.device) for value, place in zip(result, given, strict=False)]
        where = torch.device(to) if to is not None else next(iter(devices))
        return tree_map(lambda value: _put(value, where) if isinstance(value, Tensor) else value, result)


def _held(value):
    return value.held if isinstance(value, OnDevice) else value


def _put(value, device):
    return value if device.type == "cpu" else OnDevice(value, device)
