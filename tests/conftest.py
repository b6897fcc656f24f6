"""Settings of the complete suite, saved tiny models, and rows for them."""

import gc
import os

import pytest
import torch
from hypothesis import settings
from support.tiny_run import save_base, save_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

# two cores are shared by the test workers, so a single example can take long; examples are the same in every run
EXAMPLES = 25 if os.environ.get("CI") else 50
settings.register_profile("siftune", deadline=None, derandomize=True, max_examples=EXAMPLES)
settings.load_profile("siftune")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True, scope="module")
def no_old_garbage():
    """Exclude objects of earlier modules from garbage collection: trainings ask for it, and it takes up to a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny llama."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def half(base, tmp_path_factory):
    """Folder of the tiny llama as a bfloat16 checkpoint."""
    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    """File of 24 rows."""
    return save_rows(tmp_path / "rows.jsonl")
