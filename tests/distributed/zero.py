"""One rank of runs with methods, by DDP and by the stages of DeepSpeed's ZeRO, and gone on with from a checkpoint.

Saves what each ended with, by method, by the name of the settings, and by how it was run; and how many of the base's
numbers the rank held while it trained.
"""

import json
import os
import sys
from pathlib import Path

import torch
from support.every_method import SETTINGS, trained
from support.tiny import tiny
from support.trainers import adapted, leave
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from siftune.base.ranks import first_rank_first, join_launch


class Held(TrainerCallback):
    """Counts the numbers of the frozen weights between two steps."""

    count = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.count = sum(p.numel() for p in model.parameters() if not p.requires_grad)


def by_zero(stage, **more):
    """DeepSpeed's config; in stage 3 nothing stays whole but what siftune asks for."""
    whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    return {**auto, "zero_optimization": {"stage": stage, **whole}, "zero_force_ds_cpu_optimizer": False, **more}


EXACT = {"max_grad_norm": 0.0}  # a norm is summed in another order
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
KINDS = ("dora", "series", "parallel", "ia3")
HOW = {
    "ddp": {},
    "zero1": {"deepspeed": by_zero(1)},
    "zero2": {"deepspeed": by_zero(2)},
    "zero3": {"deepspeed": by_zero(3)},
    "bf16": {"bf16": True, "deepspeed": by_zero(3, bf16={"enabled": True})},
    "own optimizer": {"deepspeed": by_zero(2, optimizer=ADAMW)},
    "loaded": {"deepspeed": by_zero(3)},  # by from_pretrained, which divides the weights as it reads them
    **{f"{kind}, ddp": {"kind": kind} for kind in KINDS},
    **{f"{kind}, zero3": {"kind": kind, "deepspeed": by_zero(3)} for kind in KINDS},
}


def loaded(folder):
    """The base as a script has it that makes its TrainingArguments first."""
    with first_rank_first():
        if not folder.exists():
            tiny("llama").save_pretrained(folder)
    live = HfDeepSpeedConfig(by_zero(3, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=1))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not sum(p.numel() for p in model.parameters()), live
    return model


def model_of(way, folder, kind=None):
    """What a way trains; None: what they all do."""
    if way == "loaded":
        return adapted(base=loaded(folder / "base"))
    return adapted(kind=kind, rank=None if kind == "ia3" else 2) if kind else None


if __name__ == "__main__":
    join_launch()
    out, results = Path(sys.argv[1]), {}
    for name, kind, way, resume in json.loads(sys.argv[2])["runs"]:
        folder, held = out / name / kind / way, Held()
        try:
            given = {**(EXACT if kind == "plain" else {}), **HOW[way], **SETTINGS[kind]}
            given |= {"resume": resume and str(folder / "checkpoint-2"), "also": [held]}
            model = model_of(way, folder, given.pop("kind", None))
            found, trainer = trained(folder, name, model=model, **given)
        except Exception as error:
            if way != "own optimizer":
                raise
            found = {"refused": str(error)}
        unset_hf_deepspeed_config()  # else the next model is divided while it is made
        results[name, kind, way, resume] = {**found, "held": held.count}
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")
    leave(trainer)
