"""GAST in TRL's SFTTrainer: python examples/sft_gast.py [MODEL ROWS [STEPS]].

MODEL is a folder or hub id, ROWS a .jsonl with `prompt` and `completion`; `siftune demo --out runs/demo` leaves both.
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from siftune import GAST

DEFAULTS = [str(Path("~/.cache/siftune/smollm2-135m-instruct").expanduser()), "runs/demo/pool.jsonl", "20"]
model_name, rows_file, steps = sys.argv[1:] + DEFAULTS[len(sys.argv) - 1 :]

method = GAST(select=0.75, keep=True)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(model_name),
    SFTConfig(
        "runs/sft_gast",
        max_steps=int(steps),
        learning_rate=5e-4,
        logging_steps=5,
        report_to="none",
        # a processor knows no bfloat16 autocast; activation checkpointing saves memory that it has
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
        gradient_checkpointing=torch.accelerator.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=rows_file, split="train").select_columns(["prompt", "completion"]),
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[method],
)
trainer.train()
for choice in method.history[-3:]:
    print(f"step {choice.step}: layer 0 followed rows {choice.selected[0].tolist()}, its scores {choice.scores[0]}")
