"""Settings of the whole suite."""

import os
from zlib import crc32

import setuptools  # noqa: F401  before anything imports pip, after which torch cannot: PEFT's BOFT asks torch for a compiler
import torch
from hypothesis import settings

# two cores are shared by the test workers, so a single example can take long; examples are the same in every run
EXAMPLES = 25 if os.environ.get("CI") else 50
settings.register_profile("siftune", deadline=None, derandomize=True, max_examples=EXAMPLES)
settings.load_profile("siftune")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(config, items):
    """Of tests that are marked `matrix` leave one in eight, the same in every run, unless -m names them."""
    if "matrix" in config.getoption("-m"):
        return
    left_out = {item for item in items if item.get_closest_marker("matrix") and crc32(item.nodeid.encode()) % 8 != 2}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
