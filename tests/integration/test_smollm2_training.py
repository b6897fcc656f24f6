"""The main job on a real model: SmolLM2-135M-Instruct learns arithmetic with IST."""

import json
import math

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from support.tiny_run import choices_of, lines
from transformers import AutoModelForCausalLM

from siftune.cli.demo_rows import arithmetic_rows
from siftune.methods.options import ISTSettings
from siftune.recipe.schema import Recipe
from siftune.train.run import train

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_three_steps_of_ist(smollm2, tmp_path, adapter):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in arithmetic_rows(12, seed=0)))
    recipe = Recipe(
        model=str(smollm2), train=str(rows), out=str(tmp_path / "run"), adapter=adapter, rank=4, batch_size=4, steps=3,
        method="ist", ist=ISTSettings(interval=2, score_batch_size=4), lr=1e-3, log_every=1,
    )  # fmt: skip
    done = train(recipe, Console(quiet=True))
    losses = [line["loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 3
    assert all(math.isfinite(loss) and 0 < loss < 8 for loss in losses)
    selection = choices_of(tmp_path / "run")
    assert [len(line["layers"]) for line in selection] == [7, 7, 7]
    assert len(selection[2]["importance"]) == 30
    base = AutoModelForCausalLM.from_pretrained(smollm2)
    ids = done.tokenizer("What is 12 + 30?", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = base(ids).logits
        loaded = PeftModel.from_pretrained(base, done.folder.adapter, autocast_adapter_dtype=False)
        tuned, ours = loaded.eval()(ids).logits, done.model.eval()(ids).logits
    assert not torch.equal(tuned, plain)
    assert float((tuned - ours).abs().max()) <= 0.05 * float(plain.abs().max())  # bfloat16 against a float32 adapter
