"""What `import siftune` offers, and what it does not cost."""

import importlib.metadata
import inspect
import subprocess
import sys
from importlib.resources import files

import pytest

import siftune
import siftune.offsite

PACKAGES = [siftune, siftune.offsite]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_documented(package):
    for name in package.__all__:
        assert getattr(package, name).__doc__, name


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_sorted(package):
    assert list(package.__all__) == sorted(package.__all__)
    assert set(package._LAZY) == set(package.__all__)


def test_names_are_few():
    assert sum(len(package.__all__) for package in PACKAGES) <= 20
    assert dir(siftune) == sorted([*siftune.__all__, "__version__"])
    assert dir(siftune.offsite) == sorted(siftune.offsite.__all__)


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'GASD'; public names: .*IST"):
        siftune.GASD  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'emulat'; public names: .*emulate"):
        siftune.offsite.emulat  # noqa: B018


def test_the_version_is_that_of_the_package():
    assert siftune.__version__ == importlib.metadata.version("siftune")


def test_the_package_is_typed():
    assert (files("siftune") / "py.typed").is_file()


def test_import_is_light():
    heavy = "('torch', 'transformers', 'peft')"
    code = f"import sys, siftune, siftune.offsite; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_signature_of_a_callback_has_all_arguments_and_its_help_their_values():
    names = [*inspect.signature(siftune.GAST).parameters]
    assert names[:2] == ["select", "support"]
    assert {"seed", "layers", "support_set", "pairs", "keep"} <= {*names}
    help_of_gast = " ".join(siftune.GAST.__doc__.split())
    assert "an integer, at least 1, or a number, above 0 and at most 1; default: 0.75." in help_of_gast
    assert "0x" not in str(inspect.signature(siftune.GAST)) + help_of_gast
