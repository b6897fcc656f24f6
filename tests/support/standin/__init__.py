"""A stand-in accelerator for tests, on a machine that has none: see `device.cpp`.

    with standin.accelerator():             # torch.accelerator.is_available(); a Trainer uses standin:0
        with standin.observed() as seen:
            ...
    seen.waits, seen.operations             # (operation, file:line of the caller) -> times

It is compiled on first use, into torch's folder for extensions, which takes a minute or two. Outside of the block
`accelerator()` torch reports no accelerator, so that other tests in the process are not affected.
"""

import ctypes
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from types import ModuleType

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import offload
from safetensors import safe_open
from torch.utils import cpp_extension

from siftune.base.numerics import has_float64

DEVICES = 2
MISSING = "the stand-in accelerator needs a C++ compiler and ninja: install g++ and ninja"

_SOURCE = Path(__file__).with_name("device.cpp")
_UNLIMITED = 2**63 - 1
_OBSERVER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int)


def can_compile() -> bool:
    """Whether the stand-in can be compiled here."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None and cpp_extension.is_ninja_available()


@dataclass
class Observed:
    """What the host did with the device in a block.

    Attributes:
        operations: Launched operations: (name, file:line of the caller) -> times. Views and allocations launch nothing.
        waits: Times that the host had to wait for the device: (reason, file:line) -> times.
    """

    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)


@contextmanager
def accelerator() -> Iterator[None]:
    """Make the stand-in available in this block, and have accelerate and transformers use it."""
    register()
    torch.ops.standin.set_available(True)
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "standin:0"
    for index in range(DEVICES):
        torch.ops.standin.seed(index, index)
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE")
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before
        torch.ops.standin.set_available(False)
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def hidden() -> Iterator[None]:
    """Have the block run on the CPU, to compare with."""
    torch.ops.standin.set_available(False)
    device = os.environ.pop("ACCELERATE_TORCH_DEVICE")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
        torch.ops.standin.set_available(True)
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def limited(free: int) -> Iterator[None]:
    """Leave each device this many bytes beside the memory in use."""
    for index in range(DEVICES):
        torch.ops.standin.limit(index, torch.accelerator.memory_allocated(index) + free)
    try:
        yield
    finally:
        for index in range(DEVICES):
            torch.ops.standin.limit(index, _UNLIMITED)


@contextmanager
def without_float64() -> Iterator[None]:
    """Have the device refuse float64 in this block, as Apple's do."""
    has_float64.cache_clear()
    torch.ops.standin.set_float64(False)
    try:
        yield
    finally:
        torch.ops.standin.set_float64(True)
        has_float64.cache_clear()


@contextmanager
def observed() -> Iterator[Observed]:
    """Observe launched operations and waits of the host in this block."""
    seen = Observed()

    def note(name: bytes, event: int) -> None:
        (seen.waits if event else seen.operations)[name.decode(), _caller()] += 1

    callback = _OBSERVER(note)
    observe = register().standin_observe
    observe(callback)
    try:
        yield seen
    finally:
        observe(_OBSERVER())


_HERE = str(Path(__file__).resolve().parents[3]) + os.sep


def _caller() -> str:
    """The innermost line of siftune or another library in the calling thread; "autograd" without one."""
    frame = sys._getframe().f_back
    while frame is not None:
        name = frame.f_code.co_filename
        own, library = name.startswith(_HERE), name.partition("site-packages/")[2]
        if own and not name.startswith(_HERE + "tests/"):
            return f"{name.removeprefix(_HERE).removeprefix('src/')}:{frame.f_lineno}"
        if library and not library.startswith("torch/"):
            return f"{library}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


@cache
def register() -> ctypes.CDLL:
    """Compile the stand-in if necessary, and register it as the device `standin`.

    To be called before the process's first backward pass, at which autograd starts one thread per device.
    """
    digest = blake2b(_SOURCE.read_bytes() + torch.__version__.encode(), digest_size=6).hexdigest()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cpp_extension.get_default_build_root()), f"standin_{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    path = cpp_extension.load(
        "siftune_standin", [str(_SOURCE)], ["-O1", "-w"], build_directory=str(folder), is_python_module=False
    )
    torch.utils.rename_privateuse1_backend("standin")
    torch.ops.standin.register_hooks()
    torch._register_device_module("standin", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _move_storages_as_tensors()
    offload.safe_open = _open_on_the_host
    return ctypes.CDLL(path)


def _index(device: object) -> int:
    if device is None or isinstance(device, int):
        return torch.ops.standin.get_device() if device is None else device
    index = torch.device(device).index
    return torch.ops.standin.get_device() if index is None else index


class _Device:
    """`torch.standin.device`."""

    def __init__(self, device: object) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._before = torch.ops.standin.get_device()
        if self._index >= 0:
            torch.ops.standin.set_device(self._index)

    def __exit__(self, *_: object) -> None:
        torch.ops.standin.set_device(self._before)


def _module() -> ModuleType:
    """`torch.standin`, with the functions that torch, accelerate and transformers expect of an accelerator."""
    ops, module = torch.ops.standin, ModuleType("torch.standin")
    functions = {
        "is_available": ops.is_available,
        "device_count": lambda: DEVICES if ops.is_available() else 0,
        "current_device": ops.get_device,
        "set_device": lambda device: ops.set_device(_index(device)),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: ops.seed(ops.get_device(), seed % 2**63),
        "manual_seed_all": lambda seed: [ops.seed(index, seed % 2**63) for index in range(DEVICES)] and None,
        "get_rng_state": lambda device=None: ops.state_of(_index(device)),
        "set_rng_state": lambda state, device=None: ops.set_state_of(_index(device), state),
        "get_rng_state_all": lambda: [ops.state_of(index) for index in range(DEVICES)],
        "set_rng_state_all": lambda states: [ops.set_state_of(index, s) for index, s in enumerate(states)] and None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device": _Device,
    }
    vars(module).update(functions)
    return module


def _open_on_the_host(path: str, framework: str, device: object) -> safe_open:
    """Have accelerate read weights on the CPU first, as it does on devices that safetensors reads to with an error."""
    if "standin" in str(device):
        raise TypeError("safetensors does not know the device standin")
    return safe_open(path, framework, device)


def _move_storages_as_tensors() -> None:
    """Have torch.save and torch.load move storages of the device as tensors: torch knows no other way for it."""
    on_host, copy = torch.UntypedStorage.cpu, torch.UntypedStorage.copy_

    def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
        empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return torch.ops.aten.set_.source_Storage_storage_offset(empty, storage, 0, [storage.size()], [1])

    def cpu(self: torch.UntypedStorage) -> torch.UntypedStorage:
        return bytes_of(self).cpu().untyped_storage() if self.device.type == "standin" else on_host(self)

    def copy_(self: torch.UntypedStorage, source: torch.UntypedStorage, *rest: bool) -> torch.UntypedStorage:
        if "standin" not in (self.device.type, source.device.type):
            return copy(self, source, *rest)
        bytes_of(self).copy_(bytes_of(source))
        return self

    torch.UntypedStorage.cpu, torch.UntypedStorage.copy_ = cpu, copy_
