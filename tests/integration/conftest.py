"""The real model that integration tests share."""

import pytest

from siftune.base.errors import ModelError
from siftune.models.smollm2 import pull_smollm2


@pytest.fixture(scope="session")
def smollm2():
    """The model's folder; fetched on first use."""
    try:
        return pull_smollm2()
    except ModelError as error:
        pytest.skip(f"smollm2 cannot be fetched here: {error}")
