"""Deterministic algorithms: on in the block, as before after it, and errors of operations that have none."""

import os

import pytest
import torch

from siftune.base.determinism import deterministic_algorithms
from siftune.base.errors import UnsupportedError


def state():
    names = ("CUBLAS_WORKSPACE_CONFIG", "HCCL_DETERMINISTIC", "FLASH_ATTENTION_DETERMINISTIC")
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        *map(os.environ.get, names),
    )


@pytest.mark.parametrize("warns", [None, True])
def test_the_former_state_is_restored(monkeypatch, warns):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the user's
    torch.use_deterministic_algorithms(warns is not None, warn_only=bool(warns))
    before = state()
    try:
        with deterministic_algorithms():
            assert state() == (True, False, True, False, ":4096:8", "1", "1")
        assert state() == before
        with deterministic_algorithms(False):
            assert state() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operation_without_deterministic_implementation_is_refused():
    def put():
        return torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))

    put()
    with pytest.raises(UnsupportedError, match=r"put_ .*--deterministic"), deterministic_algorithms():
        put()
    with pytest.raises(RuntimeError, match="other"), deterministic_algorithms():
        raise RuntimeError("an other error")
