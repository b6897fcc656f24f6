"""The stand-in accelerator for the tests in this folder; see `support.standin`."""

import pytest
from support import standin


@pytest.fixture(autouse=True)
def device():
    """The stand-in, available during a test; skipped without a compiler."""
    if not standin.can_compile():
        pytest.skip(standin.MISSING)
    with standin.accelerator():
        yield "standin:0"
