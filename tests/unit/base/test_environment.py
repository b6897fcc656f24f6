"""What a result was measured on."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from siftune.base.environment import hardware, peak_memory_mb, versions


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    held = bytearray(1_500_000_000)
    code = "from siftune.base.environment import peak_memory_mb; print(peak_memory_mb())"
    peak = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 50 < peak < 1000 < peak_memory_mb()
    del held


def test_versions_and_hardware():
    assert versions()["torch"] == torch.__version__
    assert {"python", "siftune", "transformers", "peft"} <= set(versions())
    assert hardware()


def test_a_package_that_is_missing(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("siftune.base.environment.version", missing)
    assert versions()["torch"] == "not installed"
