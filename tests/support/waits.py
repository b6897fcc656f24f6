"""Operations after which the host of an accelerator waits for it, counted on the CPU.

    with HostWaits() as waits:
        ...
    waits.lines    # {("item", "guards/non_finite.py:66"): 1}

The host waits if it reads a value, or if the shape of a result depends on values. Such an operation counts if siftune
or a test asked for it, also by a function of torch; those of transformers and other libraries do not count. Tensors
that are on the CPU of every machine count as well. A copy by `.to(device)` looks the same in both directions: it does
not count, unless the device is the text "cpu".
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import siftune

_OURS = (str(Path(siftune.__file__).parent), str(Path(__file__).parents[1]))
_SKIPPED = (str(Path(torch.__file__).parent), __file__)  # they act for their callers
_ATEN = torch.ops.aten
_READS = {_ATEN._local_scalar_dense, _ATEN.equal}  # the first is that of .item(), float(), int() and bool()
_SHAPED_BY_VALUES = {_ATEN.nonzero, _ATEN.masked_select, _ATEN._unique2, _ATEN.repeat_interleave}
_INDEXED = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_}
_METHODS = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}  # torch runs no operation for them on the CPU


class HostWaits(TorchDispatchMode):
    """Counts within the block.

    Attributes:
        lines: Waits by operation and line.
    """

    def __init__(self):
        super().__init__()
        self.lines = Counter()
        self._methods = _Methods(self)

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])
        if by_mask or func.overloadpacket in _READS | _SHAPED_BY_VALUES:
            self.count(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, name):
        """Note an operation of a line, unless another library asked for it."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename.startswith(_OURS):
            place = "/".join(Path(frame.f_code.co_filename).parts[-2:])
            self.lines[name, f"{place}:{frame.f_lineno}"] += 1


class _Methods(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        to_host = func is torch.Tensor.to and "cpu" in (*args[1:], *(kwargs or {}).values())
        if to_host or func in _METHODS:
            self._waits.count(func.__name__)
        return func(*args, **(kwargs or {}))
