"""The stand-in accelerator for the tests in this folder; see `support.standin`."""

from pathlib import Path

import pytest
from support import standin

_HERE = Path(__file__).parent


def pytest_collection_finish(session):
    """Register the stand-in before any test: autograd starts its threads at the process's first backward pass."""
    if any(_HERE in item.path.parents for item in session.items) and standin.can_compile():
        standin.register()


@pytest.fixture(autouse=True)
def device():
    """The stand-in, available during a test; skipped without a compiler."""
    if not standin.can_compile():
        pytest.skip(standin.MISSING)
    with standin.accelerator():
        yield "standin:0"
