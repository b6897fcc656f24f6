"""A saved tiny model and rows for it."""

import pytest
from support.tiny_run import save_base, save_rows


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny llama."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows(tmp_path):
    """File of 24 rows."""
    return save_rows(tmp_path / "rows.jsonl")
