"""What `import siftune` offers, and what it does not cost."""

import importlib.metadata
import subprocess
import sys
from importlib.resources import files

import pytest

import siftune


def test_every_public_name_is_there_and_documented():
    for name in siftune.__all__:
        assert getattr(siftune, name).__doc__, name


def test_names_are_few_and_sorted():
    assert list(siftune.__all__) == sorted(siftune.__all__)
    assert len(siftune.__all__) <= 15
    assert set(siftune._LAZY) == set(siftune.__all__)
    assert dir(siftune) == sorted([*siftune.__all__, "__version__"])


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'GASD'; public names: .*IST"):
        siftune.GASD  # noqa: B018


def test_the_version_is_that_of_the_package():
    assert siftune.__version__ == importlib.metadata.version("siftune")


def test_the_package_is_typed():
    assert (files("siftune") / "py.typed").is_file()


def test_import_is_light():
    code = "import sys, siftune; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
