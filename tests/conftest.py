"""Settings of the complete suite."""

import os

import torch
from hypothesis import settings

# two cores are shared by the test workers, so a single example can take long; examples are the same in every run
EXAMPLES = 25 if os.environ.get("CI") else 50
settings.register_profile("siftune", deadline=None, derandomize=True, max_examples=EXAMPLES)
settings.load_profile("siftune")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
