"""Memory computed from a config, beside what the stand-in's allocator counts in the same steps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from siftune.bench.cost import Workload
from siftune.bench.plan import plan
from siftune.bench.worker import random_rows
from siftune.train.build import build

pytestmark = pytest.mark.compiled

WORK = Workload(batch_size=8, length=128, rank=8, interval=2)
CONFIG = AutoConfig.for_model(
    "llama", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
    vocab_size=500, dtype=torch.float32,
    hidden_act="relu",  # the stand-in has no kernel for the backward pass of silu, but several operations
)  # fmt: skip


class Peak(TrainerCallback):
    """Counts from the end of the first step."""

    def __init__(self):
        self.bytes = 0

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            torch.accelerator.reset_peak_memory_stats(0)
        self.bytes = torch.accelerator.max_memory_allocated(0)


def counted(folder, method, checkpointing, steps):
    """Peak of the steps after the first, by the allocator."""
    others = torch.accelerator.memory_allocated(0)  # of tests before
    peak, model = Peak(), AutoModelForCausalLM.from_config(CONFIG)
    recipe = replace(
        WORK.recipe(method, str(folder)), steps=1 + steps, attention="eager", checkpointing=checkpointing, log_every=99
    )
    rows = random_rows(WORK, CONFIG.vocab_size).select(range(WORK.batch_size))
    built = build(recipe, model, SimpleNamespace(pad_token_id=0), {"train": rows}, folder, [peak])
    built.trainer.train()
    built.release()
    return peak.bytes - others


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [
        *((method, False) for method in ("dense", "ist", "gast-rest", "gast-sample", "dense-dp")),
        *((method, True) for method in ("dense", "gast-sample")),
    ],
)
def test_planned_memory_is_that_of_the_allocator(tmp_path, method, checkpointing):
    need = plan(CONFIG, WORK, method, attention="eager", checkpointing=checkpointing)
    peak = counted(tmp_path, method, checkpointing, steps=2)
    assert need.peak == pytest.approx(peak, rel=0.002)
