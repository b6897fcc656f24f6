"""Deterministic algorithms during a block: the same numbers in every run on the same machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from siftune.base.errors import UnsupportedError

# of transformers' `enable_full_determinism`, without those that let the host wait for each kernel of CUDA
_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "ASCEND_LAUNCH_BLOCKING": "1",
    "HCCL_DETERMINISTIC": "1",
}
_NONE = " does not have a deterministic implementation"  # torch's message after the name of an operation


@contextmanager
def deterministic_algorithms(on: bool = True) -> Iterator[None]:
    """Use deterministic algorithms alone while a block runs, and restore the former state.

    Variables of the environment that the user has set are left as they are.

    Args:
        on: False changes nothing.

    Raises:
        UnsupportedError: An operation of the block has no deterministic implementation.

    Example:
        >>> with deterministic_algorithms():
        ...     torch.are_deterministic_algorithms_enabled()
        True
        >>> torch.are_deterministic_algorithms_enabled()
        False
    """
    if not on:
        yield
        return
    algorithms = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    added = {name: value for name, value in _VARIABLES.items() if name not in os.environ}
    os.environ.update(added)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(_NONE)
        if not found:
            raise
        raise UnsupportedError(
            f"{operation} has no deterministic implementation on this device: train without --deterministic"
        ) from error
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warns)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        for name in added:
            os.environ.pop(name, None)
