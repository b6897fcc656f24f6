"""The lines of docs/tools.md run as they are printed."""

import json
import re
import sys
from pathlib import Path

import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer
from support.trainers import adapted, rows, weights
from torch.utils.data import DataLoader

from siftune import GAST

PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")


def block(heading):
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE).group(1)
    return re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE).group(1)


def run(code, **names):
    exec(compile(code, "docs/tools.md", "exec"), names)
    return names


def loop():
    model = adapted()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return model, optimizer, DataLoader(rows().with_format("torch"), batch_size=4)


def test_trls_command_line(tmp_path, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    tiny("llama", 2, vocab_size=300, eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": f"{i} and {i}?", "completion": f" {2 * i}."}) for i in range(12)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = (
        f"--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/rows --use_peft --output_dir {tmp_path}/out"
    )
    quiet = "--max_steps 2 --per_device_train_batch_size 4 --use_cpu --bf16 false --report_to none --logging_steps 1"
    monkeypatch.setattr(sys, "argv", ["sift.py", *words.split(), *quiet.split(), "--gradient_checkpointing", "false"])
    names = run(block("TRL's command line"))
    logs = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert [entry["gast/followed"] for entry in logs] == [0.75, 0.75]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_accelerate_trains_what_a_plain_loop_does():
    model, optimizer, loader = loop()
    names = run(block("Accelerate"), model=model, optimizer=optimizer, loader=loader)
    plain, optimizer, loader = loop()
    plain.train()
    with GAST(select=0.75, support="rest").attach(plain, optimizer=optimizer) as selection:
        for number, batch in enumerate(loader):
            (plain(**batch).loss / 2).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert (selection.steps, names["selection"].steps) == (3, 3)  # not one for each of six batches
    for name, value in weights(plain).items():
        assert torch.equal(weights(model)[name], value), name
