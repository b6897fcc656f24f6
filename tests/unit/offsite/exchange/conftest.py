"""A small model, and a kit of it."""

import pytest
from support.emulators import base, made_kit


@pytest.fixture(scope="module")
def model():
    return base(layers=3, vocab_size=300).float()


@pytest.fixture(scope="module")
def kit(model, tmp_path_factory):
    return made_kit(model, tmp_path_factory.mktemp("owner") / "kit")
