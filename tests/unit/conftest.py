"""A way to interfere with the runs of `train`, and one to undo full determinism."""

import os
from unittest.mock import patch

import pytest
import torch

from siftune.train.trainer import SiftTrainer


@pytest.fixture
def interfere(monkeypatch):
    """Return a function that adds a callback to the Trainer of the next runs."""

    def add(callback):
        def start(self, *args, callbacks=(), **kwargs):
            original(self, *args, callbacks=[*callbacks, callback], **kwargs)

        original = SiftTrainer.__init__
        monkeypatch.setattr(SiftTrainer, "__init__", start)

    return add


@pytest.fixture
def restored_algorithms():
    """Undo after a test what transformers sets for the whole process when it trains with full determinism."""
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
