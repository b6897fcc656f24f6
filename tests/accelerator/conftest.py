"""The stand-in accelerator for the tests in this folder; see `support.standin`."""

import pytest
from support import standin
from support.tiny_run import save_base, save_rows


@pytest.fixture(autouse=True)
def device():
    """The stand-in, available during a test; skipped without a compiler."""
    if not standin.can_compile():
        pytest.skip(standin.MISSING)
    with standin.accelerator():
        yield "standin:0"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny llama."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows(tmp_path):
    """File of 24 rows."""
    return save_rows(tmp_path / "rows.jsonl")
