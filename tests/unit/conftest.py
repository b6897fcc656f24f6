"""A saved tiny model, rows for it, and a way to interfere with the runs of `train`."""

import pytest
from support.tiny_run import save_base, save_rows

from siftune.train.trainer import SiftTrainer


@pytest.fixture(scope="session", autouse=True)
def list_of_recipes(tmp_path_factory):
    """Keep the user's list of own recipes out of the tests."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("siftune.records.again.cache_root", lambda: cache)
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny llama."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows(tmp_path):
    """File of 24 rows."""
    return save_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def interfere(monkeypatch):
    """Return a function that adds a callback to the Trainer of the next runs."""

    def add(callback):
        def start(self, *args, callbacks=(), **kwargs):
            original(self, *args, callbacks=[*callbacks, callback], **kwargs)

        original = SiftTrainer.__init__
        monkeypatch.setattr(SiftTrainer, "__init__", start)

    return add
