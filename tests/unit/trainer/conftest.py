"""A way to interfere with the runs of `train`."""

import pytest

from siftune.trainer.trainer import SiftTrainer


@pytest.fixture
def interfere(monkeypatch):
    """Return a function that adds a callback to the Trainer of the next runs."""

    def add(callback):
        def start(self, *args, callbacks=(), **kwargs):
            original(self, *args, callbacks=[*callbacks, callback], **kwargs)

        original = SiftTrainer.__init__
        monkeypatch.setattr(SiftTrainer, "__init__", start)

    return add
