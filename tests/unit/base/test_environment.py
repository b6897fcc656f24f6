"""The process and its machine: versions, memory, threads."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from siftune.base.environment import (
    hardware,
    peak_memory_mb,
    processors_allowed,
    settle_threads,
    versions,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    held = bytearray(1_500_000_000)
    code = "from siftune.base.environment import peak_memory_mb; print(peak_memory_mb())"
    peak = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 50 < peak < 1000 < peak_memory_mb()
    del held


def test_versions_and_hardware():
    assert torch.__version__.startswith(versions()["torch"])
    assert {"python", "siftune", "transformers", "peft"} <= set(versions())
    assert hardware()


def test_a_package_that_is_missing(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("siftune.base.environment.version", missing)
    assert versions()["torch"] == "not installed"


def run_on(monkeypatch, processors):
    """Have a machine of 64 processors, on some of which this process may run."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)


def limits_of(folder, version, quota, period="100000"):
    """A container's limits, as one of the two versions of control groups keeps them."""
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        (folder / "cpu").mkdir()
        (folder / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    return folder


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "allowed"), [("200000", 2), ("250000", 2), ("50000", 1), ("max", None), ("-1", None)]
)
def test_a_containers_limit(tmp_path, version, quota, allowed):
    assert processors_allowed(limits_of(tmp_path, version, quota)) == allowed


def test_no_limit_and_nonsense(tmp_path):
    assert processors_allowed(tmp_path) is None
    assert processors_allowed(limits_of(tmp_path, 2, "200000", "0")) is None


def test_the_limit_holds_where_there_are_more_processors(tmp_path, monkeypatch):
    limits = limits_of(tmp_path, 2, "200000")
    for processors, threads in ((64, "2"), (2, None)):
        run_on(monkeypatch, processors)
        variables = {}
        settle_threads(variables, limits)
        assert variables.get("OMP_NUM_THREADS") == threads


def test_what_the_user_has_set_stays(tmp_path, monkeypatch):
    run_on(monkeypatch, 64)
    limits = limits_of(tmp_path, 2, "200000")
    for own in ({"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "5"}, {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}):
        variables = dict(own)
        settle_threads(variables, limits)
        assert variables == own


def test_it_is_settled_before_torch_is_loaded():
    """OpenMP reads the variables once, when it is loaded."""
    code = (
        "import os, sys; from siftune.cli.main import main; main(['--version']); "
        "assert os.environ['GOMP_SPINCOUNT'] and 'torch' not in sys.modules"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean, stdout=subprocess.DEVNULL)
