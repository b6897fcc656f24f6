"""Kits as ordinary models."""

import os

import pytest
import torch
from support.emulators import base, calibration, emulator, logits, settings
from support.kits import copied, small_kit
from support.tokenizer import byte_tokenizer
from transformers import Trainer, TrainingArguments

from siftune.base.errors import KitError, ModelError
from siftune.offsite.emulator.model import Split, outer_names
from siftune.offsite.exchange.emulate import emulate
from siftune.offsite.exchange.load import load_emulator, load_kit
from siftune.offsite.kit import folder as kit_folder
from siftune.offsite.kit.folder import read_kit
from siftune.offsite.kit.manifest import EMULATOR, OUTER

LAYERDROP = {"method": "layerdrop", "keep": 0.5}


@pytest.mark.parametrize(
    ("family", "how"),
    [*((family, {"keep": 0.6}) for family in ("llama", "gpt2", "gemma3", "gpt_neox")), ("llama", LAYERDROP)],
)
def test_a_loaded_kit_is_the_emulator(tmp_path, family, how):
    model = base(family, layers=6, vocab_size=300).float()
    batches = calibration(model)
    emulate(model, byte_tokenizer(), batches, tmp_path / "kit", settings(**how))
    expected = emulator(model, batches, **how)
    loaded = load_emulator(tmp_path / "kit")
    torch.testing.assert_close(logits(loaded, batches[0]), logits(expected, batches[0]), rtol=1e-5, atol=1e-5)
    assert type(loaded) is type(model)


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


# --- what is loaded is what was checked

LOADED = (EMULATOR, OUTER, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_kit(tmp_path_factory.mktemp("sound") / "kit")


def exchange(path, data):
    """Put another file in the place of one."""
    path.with_name("beside").write_bytes(data)
    os.replace(path.with_name("beside"), path)


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("how", ["written over", "exchanged", "longer", "a link", "gone"])
def test_a_file_that_changes_after_the_check_is_refused_by_name(sound, tmp_path, name, how):
    kit = read_kit(copied(sound.path, tmp_path / "kit"))
    path = kit.path / name
    data = path.read_bytes()
    other = data[:-1] + bytes([data[-1] ^ 1])
    (tmp_path / "outside").write_bytes(data)
    if how == "written over":
        path.write_bytes(other)
    elif how == "exchanged":
        exchange(path, other)
    elif how == "longer":
        path.write_bytes(data + b" ")
    else:
        path.unlink()
    if how == "a link":
        path.symlink_to(tmp_path / "outside")
    with pytest.raises(KitError, match=rf"kit .*/kit: {name}"):
        load_kit(kit)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_a_file_that_is_not_read_again_may_change(sound, tmp_path, name):
    kit = read_kit(copied(sound.path, tmp_path / "kit"))
    (kit.path / name).write_text("{}")
    model, _ = load_kit(kit)
    assert model.config.hidden_size == sound.config["hidden_size"]


def test_another_sound_kit_in_its_place_is_refused(sound, tmp_path):
    """With a manifest of its own, to which all of its files are true."""
    kit = read_kit(copied(sound.path, tmp_path / "kit"))
    kit.path.rename(tmp_path / "gone")
    small_kit(tmp_path / "kit", rms_norm_eps=1e-5, hidden_size=64)
    with pytest.raises(KitError, match=f"{EMULATOR} has "):
        load_kit(kit)


def test_tensors_take_the_memory_of_the_file_once(sound):
    """They are mapped from the file, and the values are the file's."""
    from safetensors.torch import load_file

    for name in (EMULATOR, OUTER):
        found, wanted = kit_folder.load_weights(sound, name), load_file(sound.path / name)
        assert list(found) == list(wanted)
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in wanted.items())
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.values())
        assert len({t.untyped_storage().data_ptr() for t in found.values()}) == len(found)


def test_changes_of_loaded_tensors_do_not_reach_the_file(sound):
    before = (sound.path / OUTER).read_bytes()
    for tensor in kit_folder.load_weights(sound, OUTER).values():
        tensor.add_(1)
    assert (sound.path / OUTER).read_bytes() == before
