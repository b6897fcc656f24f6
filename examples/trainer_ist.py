"""IST in transformers' Trainer: python examples/trainer_ist.py [MODEL ROWS [STEPS]].

MODEL is a folder or hub id, ROWS a .jsonl with `prompt` and `completion`; `siftune demo --out runs/demo` leaves both.
"""

import sys
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from siftune import IST

DEFAULTS = [str(Path("~/.cache/siftune/smollm2-135m-instruct").expanduser()), "runs/demo/pool.jsonl", "30"]
model_name, rows_file, steps = sys.argv[1:] + DEFAULTS[len(sys.argv) - 1 :]

tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
    """Turn a row into token ids, and have only the completion learned."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"] + tokenizer.eos_token)["input_ids"]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


rows = load_dataset("json", data_files=rows_file, split="train")
method = IST(active=0.25)
trainer = Trainer(
    model,
    TrainingArguments("runs/trainer_ist", max_steps=int(steps), learning_rate=1e-3, logging_steps=5, report_to="none"),
    train_dataset=rows.map(tokenize, remove_columns=rows.column_names),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[method],
)
trainer.train()
print("layers by importance, highest first:", method.importance.argsort(descending=True).tolist())
