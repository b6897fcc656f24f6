"""Runs of `siftune train` on the stand-in accelerator."""

import pytest
import torch
from support import standin
from support.tiny_run import recipe

from siftune.train.run import train

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("method", ["dense", "ist", "gast"])
def test_a_device_without_float64(base, rows, tmp_path, method):
    with standin.without_float64():
        run = train(recipe(base, rows, tmp_path / "run", method=method, steps=3, eval=str(rows)))
    assert run.summary["steps"] == 3
    assert run.summary["eval_loss"] is not None


def test_the_peak_is_that_of_the_run_over_all_devices(base, rows, tmp_path):
    for index in range(standin.DEVICES):  # of something else before it
        torch.zeros(10**8, dtype=torch.uint8, device=f"standin:{index}")
    run = train(recipe(base, rows, tmp_path / "run", method="dense", steps=2))
    assert 0 < run.summary["peak_memory_mb"] < 100
    torch.accelerator.reset_peak_memory_stats(0)
