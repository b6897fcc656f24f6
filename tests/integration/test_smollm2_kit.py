"""Offsite-tuning on a real model: a kit of SmolLM2 that comes back untouched gives the model, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from siftune.models.load import load_model
from siftune.offsite.emulator.plan import EmulatorSettings
from siftune.offsite.exchange.emulate import KitOptions, emulate
from siftune.offsite.exchange.load import load_kit
from siftune.offsite.exchange.plug import plug
from siftune.offsite.exchange.returned import write_return

pytestmark = pytest.mark.integration


def test_a_kit_that_comes_back_untouched_gives_the_model(smollm2, tmp_path):
    model, tokenizer = load_model(str(smollm2), "float32")
    text = "The sum of two numbers does not depend on their order, but their difference does."
    ids = tokenizer(text, return_tensors="pt").input_ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    options = KitOptions(dtype=torch.bfloat16)
    kit = emulate(model, tokenizer, [batch], tmp_path / "kit", EmulatorSettings(keep=0.9), options)
    emulator, _ = load_kit(kit, "float32")
    with torch.no_grad():
        losses = [float(m(**batch).loss) for m in (model, emulator)]
    assert losses[1] < losses[0] + 1.0, "what is compressed with this text should still read it"
    emulator.generate(ids[:, :4], max_new_tokens=2, do_sample=False)
    assert (kit.path / "emulator.safetensors").stat().st_size < 0.85 * (smollm2 / "model.safetensors").stat().st_size
    write_return(tmp_path / "return", load_file(kit.path / "adapter.safetensors"), kit)
    result = plug(str(smollm2), kit, tmp_path / "return", tmp_path / "tuned")
    before, after = load_file(smollm2 / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert result.dtype == "bfloat16"
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
