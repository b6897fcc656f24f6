"""Offsite-tuning in Python: python examples/two_parties.py [MODEL ROWS [STEPS]]; both parties in one script.

MODEL is a folder or hub id, ROWS a .jsonl with `prompt` and `completion`; `siftune demo --out runs/demo` leaves both.
Leaves the kit in runs/two_parties/kit and the owner's tuned model in runs/two_parties/tuned.
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune import find_layers
from siftune.offsite import EmulatorSettings, emulate, load_emulator, plug_in

DEFAULTS = [str(Path("~/.cache/siftune/smollm2-135m-instruct").expanduser()), "runs/demo/pool.jsonl", "20"]
model_name, rows_file, steps = sys.argv[1:] + DEFAULTS[len(sys.argv) - 1 :]
folder = Path("runs/two_parties")


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of four rows; prompts are learned as well, to keep it short."""
    texts = [row["prompt"] + row["completion"] for row in load_dataset("json", data_files=rows_file, split="train")]
    groups = [texts[i % len(texts) :][:4] for i in range(0, 4 * count, 4)]
    tables = [dict(tokenizer(group, padding=True, return_tensors="pt")) for group in groups]
    return [table | {"labels": table["input_ids"].where(table["attention_mask"] > 0, -100)} for table in tables]


# the owner of the model: a kit, to hand out
base, tokenizer = AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)
kit = emulate(base, tokenizer, batches(8), folder / "kit", EmulatorSettings(keep=0.7))

# the owner of the rows: only the kit's outer layers require gradients
emulator = load_emulator(folder / "kit", dtype="float32").train()
optimizer = torch.optim.AdamW((p for p in emulator.parameters() if p.requires_grad), lr=1e-4)
for step, batch in enumerate(batches(int(steps))):
    loss = emulator(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.3f}")
first, second, *_, last_but_one, last = find_layers(emulator).layers
outer = {"first.0": first, "first.1": second, "last.0": last_but_one, "last.1": last}
returned = {f"{place}.{name}": value for place, layer in outer.items() for name, value in layer.state_dict().items()}

# the owner of the model again: the tuned layers go into the whole model
report = plug_in(base, kit, returned)
base.save_pretrained(folder / "tuned")
print(f"{report.largest} moved most, by {report.tensors[report.largest].relative:.2%} of its norm")
