import hashlib
import os

import pytest
import torch
from support.kits import contents, copied, edit, header_of, read_json, repair, small_kit, tensor_specs, write_header
from support.tokenizer import byte_tokenizer
from transformers import AutoTokenizer

from siftune.base.errors import KitError
from siftune.models.families import FAMILIES
from siftune.offsite.emulator.model import Split
from siftune.offsite.kit import config as kit_config
from siftune.offsite.kit import folder as kit_module
from siftune.offsite.kit.folder import is_kit, load_config, load_tokenizer, read_kit, write_kit
from siftune.offsite.kit.manifest import parse_manifest
from siftune.offsite.kit.tensors import TensorFile

FILES = (
    *("adapter.safetensors", "chat_template.jinja", "config.json", "emulator.safetensors", "manifest.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_kit(tmp_path_factory.mktemp("sound") / "kit")


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to damage."""
    return copied(sound.path, tmp_path / "kit")


@pytest.mark.parametrize("family", [kind for kind in FAMILIES if kind != "gemma"])
def test_what_is_written_is_read(tmp_path, family):
    parts = contents(family)
    kit = write_kit(tmp_path / "kit", parts)
    assert sorted(path.name for path in kit.path.iterdir()) == sorted(FILES)
    assert kit == read_kit(kit.path)
    assert kit.manifest.middle == parts.middle
    assert (kit.manifest.model_type, kit.manifest.depth, kit.manifest.split) == (family, 5, Split(1, 1))
    assert kit.manifest.fingerprint == parts.fingerprint
    assert kit.digest == hashlib.sha256((kit.path / "manifest.json").read_bytes()).hexdigest()
    assert load_config(kit).num_hidden_layers == 5
    assert tensor_specs(kit.path / "adapter.safetensors") == kit.manifest.outer
    for name, tensors in (("emulator", parts.frozen), ("adapter", parts.outer)):
        from safetensors.torch import load_file

        loaded = load_file(kit.path / f"{name}.safetensors")
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_its_tokenizer_loads_with_and_without_siftune(sound):
    text = "Hello<|end|> you"
    for tokenizer in (load_tokenizer(sound), AutoTokenizer.from_pretrained(sound.path)):
        assert tokenizer.encode(text) == byte_tokenizer().encode(text)
        assert tokenizer.chat_template == byte_tokenizer().chat_template


def test_the_tokenizer_is_checked_again_when_it_is_loaded(folder):
    kit = read_kit(folder)
    (folder / "chat_template.jinja").write_text("x" * 140)
    with pytest.raises(KitError, match=r"chat_template\.jinja has the SHA-256"):
        load_tokenizer(kit)


def test_the_cheap_look(sound, tmp_path):
    assert is_kit(sound.path)
    assert is_kit(str(sound.path))
    for name, content in (("other", '{"siftune_return": 1}'), ("damaged", '{"siftune_kit": oops')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(content)
    assert not is_kit(tmp_path / "other")
    assert is_kit(tmp_path / "damaged"), "it must be read and refused as a kit"
    assert not is_kit(tmp_path)
    assert not is_kit(tmp_path / "missing")
    assert not is_kit(sound.path / "config.json")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "manifest.json")
    assert not is_kit(tmp_path / "pipe")


def test_a_kit_may_be_reached_by_a_link_but_hold_none(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert read_kit(tmp_path / "link")
    (folder / "config.json").rename(tmp_path / "outside.json")
    (folder / "config.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(KitError, match=r"config\.json is a link"):
        read_kit(folder)


def test_a_file_must_be_in_the_manifest_and_on_the_list(folder):
    edit(folder, "manifest.json", lambda m: m["files"].pop("chat_template.jinja") and None)
    with pytest.raises(KitError, match=r"chat_template\.jinja .*manifest\.json: files"):
        read_kit(folder)
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(read_kit(folder)).chat_template is None
    (folder / "model.py").write_text("import os")
    with pytest.raises(KitError, match=r"model\.py"):
        read_kit(folder)


def test_complaints_are_one_sentence_with_folder_file_field_and_advice(folder):
    edit(folder, "manifest.json", lambda m: m["split"].update(first=-1))
    with pytest.raises(KitError) as caught:
        read_kit(folder)
    assert str(caught.value) == (
        f"kit {folder}: manifest.json: split.first is -1, not a whole number from 0 to 5; "
        "ask whoever made it for a sound copy"
    )


def forge(folder, name, change):
    """Change a tensor file's header."""
    header, data = header_of(folder / name)
    change(header)
    write_header(folder / name, header, data)
    repair(folder)


UP = "mlp.up_proj.weight"


def test_outer_layers_that_only_manifest_and_header_agree_on_are_refused(folder):
    forge(folder, "adapter.safetensors", lambda h: h[f"first.0.{UP}"].update(shape=[32, 48]))
    edit(folder, "manifest.json", lambda m: m["adapter"][f"first.0.{UP}"].update(shape=[32, 48]))
    words = r"adapter: first\.0\.mlp\.up_proj\.weight is F32 \[32, 48\], but the model .* says F32 \[48, 32\]"
    with pytest.raises(KitError, match=words):
        read_kit(folder)


def test_half_of_the_tensors_in_another_dtype_are_refused(folder):
    """float16 and bfloat16 take as many bytes."""
    kit = small_kit(folder.parent / "half", dtype=torch.bfloat16)
    forge(kit.path, "emulator.safetensors", lambda h: h["model.norm.weight"].update(dtype="F16"))
    with pytest.raises(KitError, match=r"model\.norm\.weight is F16 \[32\], but the model"):
        read_kit(kit.path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("manifest.json", lambda m: m["adapter"][f"first.0.{UP}"].update(shape=[10**9, 32]), "shape is 1000000000"),
        ("manifest.json", lambda m: m["base"].update(layers=10**9), "layers is 1000000000"),
        ("manifest.json", lambda m: m["middle"][0].update(channels=10**9), "channels is 1000000000"),
        ("config.json", lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        ("config.json", lambda c: c.update(auto_map={"AutoConfig": "x.py--y"}), "auto_map"),
    ],
)
def test_claims_are_refused_before_anything_is_built_or_allocated(folder, monkeypatch, name, change, words):
    monkeypatch.setattr(kit_config, "make_config", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(kit_module, "open_tensors", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("loaded"))
    edit(folder, name, change)
    with pytest.raises(KitError, match=words):
        read_kit(folder)


def test_the_digest_names_the_manifest(sound):
    data = (sound.path / "manifest.json").read_bytes()
    assert parse_manifest(data) == sound.manifest
    assert sound.config == read_json(sound.path / "config.json")
