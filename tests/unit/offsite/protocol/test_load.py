"""Kits as ordinary models."""

import pytest
import torch
from support.emulators import FAMILIES, base, calibration, emulator, logits, settings
from support.tokenizer import byte_tokenizer
from transformers import Trainer, TrainingArguments

from siftune.errors import ModelError
from siftune.models.layers import find_layers
from siftune.offsite.emulator.split import Split, outer_names
from siftune.offsite.kit.folder import read_kit
from siftune.offsite.protocol.emulate import KitOptions, emulate
from siftune.offsite.protocol.load import load_emulator, load_kit

METHODS = ("gradot", "svd+flap", "layerdrop", "crash")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_kit_is_the_emulator(tmp_path, family):
    model = base(family, vocab_size=300).float()
    batches = calibration(model)
    emulate(model, byte_tokenizer(), batches, tmp_path / "kit", settings(keep=0.6), KitOptions(store=None))
    expected = emulator(model, batches, keep=0.6)
    loaded = load_emulator(tmp_path / "kit")
    torch.testing.assert_close(logits(loaded, batches[0]), logits(expected, batches[0]), rtol=1e-5, atol=1e-5)
    assert type(loaded) is type(model)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_from_disk(tmp_path, method):
    model = base(layers=6, vocab_size=300).float()
    batches = calibration(model)
    emulate(
        model, byte_tokenizer(), batches, tmp_path / "kit", settings(method=method, keep=0.5), KitOptions(store=None)
    )
    loaded, expected = load_emulator(tmp_path / "kit"), emulator(model, batches, method=method, keep=0.5)
    torch.testing.assert_close(logits(loaded, batches[0]), logits(expected, batches[0]), rtol=1e-5, atol=1e-5)
    if method == "crash":  # shared on disk, and shared again in memory
        layers = find_layers(loaded).layers
        assert len({id(layer.mlp.up_proj.weight) for layer in layers[1:5]}) == 2
        assert len({layer.self_attn.layer_idx for layer in layers}) == 6


def test_a_trainer_trains_the_outer_layers_alone(tmp_path):
    model = base(vocab_size=300).float()
    batches = calibration(model)
    emulate(model, byte_tokenizer(), batches, tmp_path / "kit", settings(keep=0.6))
    loaded, tokenizer = load_kit(read_kit(tmp_path / "kit"))
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True
    )
    rows = [{name: tensor[0] for name, tensor in batches[0].items()}] * 4
    Trainer(loaded, arguments, train_dataset=rows, processing_class=tokenizer).train()
    changed = {name for name, p in loaded.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(outer_names(loaded, Split(1, 1)).values())


def test_dtypes(tmp_path):
    model = base(vocab_size=300).float()
    emulate(model, byte_tokenizer(), calibration(model), tmp_path / "kit", settings(keep=0.6))
    assert {p.dtype for p in load_emulator(tmp_path / "kit", "bfloat16").parameters()} == {torch.bfloat16}
    with pytest.raises(ModelError, match="unknown dtype 'int8'"):
        load_emulator(tmp_path / "kit", "int8")


def test_training_does_not_change_the_kit_on_disk(tmp_path):
    model = base(vocab_size=300).float()
    kit = emulate(model, byte_tokenizer(), calibration(model), tmp_path / "kit", settings(keep=0.6))
    before = {path.name: path.read_bytes() for path in kit.path.iterdir()}
    loaded = load_emulator(kit.path)
    with torch.no_grad():
        for p in loaded.parameters():
            p.add_(1)
    assert {path.name: path.read_bytes() for path in kit.path.iterdir()} == before
