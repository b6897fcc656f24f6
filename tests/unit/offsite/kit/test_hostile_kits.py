"""Hostile kits: every case is refused by its check, in a sentence that names file and field, and nothing is written.

All hashes are right, unless they are what was changed. Fields of manifests are tested one by one in test_manifest.py,
tokenizers in test_tokenizer.py.
"""

import math
import os
import struct

import pytest
import torch
from safetensors.torch import load, save
from support.hostile import REMOVED, forge, refused
from support.kits import copied, header_of, read_json, small_kit, write_header

from siftune.base.errors import DataError
from siftune.data.encode import Encoder
from siftune.data.rows import rows_from
from siftune.offsite.kit.folder import load_tokenizer, read_kit
from siftune.offsite.kit.manifest import canonical

MANIFEST, CONFIG, TEMPLATE = "manifest.json", "config.json", "chat_template.jinja"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
EMULATOR, OUTER = "emulator.safetensors", "adapter.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_kit(tmp_path_factory.mktemp("sound") / "kit").path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What is written to the working directory is noticed too."""
    monkeypatch.chdir(tmp_path)


# --- bytes and files

BYTES = {
    "first bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "last bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[: len(data) // 2],
    "byte more": lambda data: data + b"\n",
    "zeros": lambda data: bytes(len(data)),
    "nothing": lambda data: b"",
}
NAMES = (MANIFEST, CONFIG, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, EMULATOR, OUTER)


@pytest.mark.parametrize("change", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("name", NAMES)
def test_changed_bytes(sound, tmp_path, name, change):
    folder = copied(sound, tmp_path / "kit")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    refused(read_kit, folder, name)


def linked(path, target):
    path.rename(path.parent.parent / "outside")
    path.symlink_to(target)


def replaced(path, make):
    path.unlink()
    make(path)


STRANGE = "is in it and does not belong there"
MISSING = "is missing|has no manifest.json"
A_LINK = "is a link, a folder or a device, not a file"
FILES = [
    (lambda path: path.unlink(), MISSING),
    (lambda path: linked(path, "../outside"), A_LINK),
    (lambda path: linked(path, path.parent.parent / "outside"), A_LINK),
    (lambda path: linked(path, "/dev/zero"), A_LINK),
    (lambda path: replaced(path, os.mkfifo), A_LINK),
    (lambda path: replaced(path, os.mkdir), A_LINK),
    (lambda path: path.rename(path.with_name(path.name.upper())), STRANGE),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("change", "words"), FILES)
def test_links_and_other_files_in_place_of_a_file(sound, tmp_path, name, change, words):
    folder = copied(sound, tmp_path / "kit")
    change(folder / name)
    refused(read_kit, folder, name.upper() if words is STRANGE else name, words)


@pytest.mark.parametrize("name", ["model.py", "pytorch_model.bin", ".hidden", "special_tokens_map.json", "x\ny"])
def test_additional_files(sound, tmp_path, name):
    refused(read_kit, forge(sound, tmp_path, name, "", b"x"), repr(name), STRANGE)


# --- manifests

ENTRY = {"bytes": 1, "sha256": "0" * 64}
SPEC = {"shape": [1], "dtype": "F32"}
Q = "self_attn.q_proj"
MANIFESTS = [
    ("siftune_kit", 2, "siftune_kit is 2, a protocol"),
    ("siftune_kit", True, "siftune_kit is True, a protocol"),
    ("siftune_kit", REMOVED, "has no siftune_kit"),
    ("siftune_return", 1, "has the unknown key 'siftune_return'"),
    ("calibration", REMOVED, "has no calibration"),
    ("base/layers", 10**9, "base.layers is 1000000000, not a whole number from 2 to 512"),
    ("base/layers", 5.0, "base.layers is 5.0, not a whole number"),
    ("base/layers", "5", "base.layers is '5', not a whole number"),
    ("base/model_type", "bert", "base.model_type is 'bert'"),
    ("split/first", -1, "split.first is -1, not a whole number"),
    ("middle", [], "middle has no layer"),
    ("middle", lambda layers: layers * 2, "middle has 6 items"),
    ("middle/0/channels", 10**9, "middle.0.channels is 1000000000, not a whole number"),
    ("middle/0/channels", 9, "down_proj.weight is F32 .32, 10., but the model"),
    ("middle/0/channels", 10**8, "but the model of config.json and manifest.json says F32 .32, 100000000."),
    (f"middle/0/ranks/{Q}", 4, f"{Q}.down.weight is F32 .3, 32., but the model"),
    ("adapter", lambda table: table | {"first.../x": {}}, "the name of a tensor is 'first.../x'"),
    ("adapter", lambda table: dict([*table.items()][1:]), "adapter has no tensor .*, which the model"),
    (
        "adapter",
        lambda table: table | {"first.0.x": SPEC},
        "adapter has a tensor 'first.0.x'",
    ),
    ("adapter/first.0.mlp.up_proj.weight/shape", [32, 48], "up_proj.weight is F32 .32, 48., but the model"),
    ("adapter", lambda table: {n: e | {"dtype": "F16"} for n, e in table.items()}, "adapter.safetensors: .* is F32"),
    ("files", lambda table: table | {"../outside": ENTRY}, "files has the unknown key '../outside'"),
    (f"files/{CONFIG}/path", "../outside", f"files.{CONFIG} has the unknown key 'path'"),
    (f"files/{CONFIG}/bytes", 2**63, f"files.{CONFIG}.bytes is 9223372036854775808, not a whole number"),
    (f"files/{CONFIG}/sha256", "0" * 64, f"{CONFIG} has the SHA-256"),
]


def with_text(old, new):
    return lambda data: data.replace(old, new, 1)


FORMS = [
    ("", with_text(b'"siftune_kit": 1', b'"siftune_kit": 2, "siftune_kit": 1'), "not in the form that siftune writes"),
    ("", with_text(b'"siftune_kit": 1', b'"siftune_kit": 1e0'), "siftune_kit is 1.0"),
    ("", with_text(b'"first": 1', b'"first": -0'), "not in the form that siftune writes"),
    ("", with_text(b'"first": 1', b'"first": NaN'), "NaN is not a JSON number"),
    ("", with_text(b'"first": 1', b'"first": 1e999'), "not in the form that siftune writes"),
    ("", lambda data: data + b" " * (4 << 20), "bytes, more than the 4194304 that are allowed"),
    ("", with_text(b'"split"', b'"spl\\u0069t"'), "not in the form that siftune writes"),
    ("", with_text(b"\n", b"\r\n"), "not in the form that siftune writes"),
    ("", lambda data: b"\xef\xbb\xbf" + data, "not proper JSON"),
    ("", lambda data: data.decode().encode("utf-16"), "not proper JSON"),
    ("", lambda data: data + b"// siftune_kit 2\n", "not proper JSON"),
    ("", lambda data: b"[" + data + b"]", "has no siftune_kit"),
]


# --- configs

CONFIGS = [
    ("hidden_act", "../../etc/passwd", "config.json: hidden_act is '../../etc/passwd'"),
    ("hidden_act", "xielu", "(config.json|emulator.safetensors|manifest.json: adapter) has no tensor .*act_fn.alpha_p"),
    ("auto_map", {"AutoConfig": "code.py--Config"}, "config.json has the key 'auto_map'"),
    ("_attn_implementation", "someone/kernel", "config.json has the key '_attn_implementation'"),
    ("vocab_size", 320.0, "config.json is no config of type llama"),
    ("hidden_size", 10**8, "but the model of config.json and manifest.json says"),
    ("head_dim", 10**8, "the model would compute 400000000 bytes of buffers"),
    ("vocab_size", 319, "emulator.safetensors: lm_head.weight .* says F32 .319, 32."),
    ("num_hidden_layers", 6, "config.json: num_hidden_layers is 6, but 5 by split and middle"),
    ("num_hidden_layers", REMOVED, "config.json has no num_hidden_layers"),
    ("dtype", "float64", "config.json: dtype is 'float64'; known are float32"),
    ("dtype", "bfloat16", "emulator.safetensors: .* is F32 .*, but the model of config.json"),
    ("pad_token_id", 320, "config.json: no model can be built"),
    ("tie_word_embeddings", True, "emulator.safetensors has a tensor 'lm_head.weight', which .* lacks"),
    ("", b"[]", r"config.json: model_type is \[\]"),
]


# --- tensor files: sizes and places of tensors, and their numbers


NORM = "first.0.input_layernorm.weight"


def with_tensors(**changes):
    """Tensors more, in place of others, or, with None, fewer."""

    def change(data):
        tensors = load(data) | changes
        return save({name: tensor for name, tensor in tensors.items() if tensor is not None}, {"format": "pt"})

    return change


def with_number(value):
    """The last number of the file."""
    return lambda data: data[:-4] + struct.pack("<f", value)


TENSORS = [
    (EMULATOR, "lm_head.weight/shape", [32, 320], "lm_head.weight is F32 .32, 320., but the model"),
    (EMULATOR, "lm_head.weight/shape", [320, 33], "cannot be read as safetensors"),
    (EMULATOR, "lm_head.weight/shape", [10**6, 10**5], "cannot be read as safetensors"),
    (EMULATOR, "lm_head.weight/dtype", "I32", "lm_head.weight is I32 .320, 32., but the model"),
    (EMULATOR, "lm_head.weight", REMOVED, "cannot be read as safetensors"),
    (EMULATOR, "lm_head.weight/data_offsets", [-40960, 0], "cannot be read as safetensors"),
    (EMULATOR, "lm_head.weight/data_offsets", [2**40, 2**40 + 40960], "cannot be read as safetensors"),
    (EMULATOR, "", lambda data: data + bytes(4), "cannot be read as safetensors"),
    (EMULATOR, "", lambda data: data[:-4], "cannot be read as safetensors"),
    (EMULATOR, "", lambda data: (2**63).to_bytes(8, "little") + data[8:], "cannot be read as safetensors"),
    (EMULATOR, "", with_text(b"lm_head.weight", b"../../../lm_he"), "has no tensor 'lm_head.weight'"),
    (EMULATOR, "", with_tensors(x=torch.ones(1)), "has a tensor 'x', which the model"),
    (OUTER, "", with_tensors(x=torch.ones(1)), "has a tensor 'x', which the model"),
    (OUTER, "", with_tensors(**{NORM: None}), f"has no tensor '{NORM}', which the model"),
    (OUTER, "", with_tensors(**{NORM: torch.ones(31)}), f"{NORM} is F32 .31., but the model"),
    (OUTER, "", with_tensors(**{NORM: torch.ones(32).half()}), f"{NORM} is F16 .32., but the model"),
    (EMULATOR, "", with_number(float("nan")), "model.norm.weight has values that are NaN or infinite"),
    (OUTER, "", with_number(-65505.0), "v_proj.weight has the value 65505; up to 65504 is allowed"),
]


# --- tokenizers

TOKENIZERS = [
    (TOKENIZER, "model/vocab/zz", 320, "'zz' is token 320 of 320 embeddings"),
    (TOKENIZER, "model", REMOVED, "no tokenizer can be made of"),
    (TOKENIZER, "", b"\xff", "no tokenizer can be made of"),
    (TOKENIZER, "", b'{"a":' * 1_000_000, "no tokenizer can be made of"),
    (TOKENIZER_CONFIG, "auto_map", {"AutoTokenizer": ["code.py", None]}, "has the unknown key 'auto_map'"),
    (TOKENIZER_CONFIG, "tokenizer_file", "/etc/passwd", "has the unknown key 'tokenizer_file'"),
    (TOKENIZER_CONFIG, "tokenizer_class", "Evil", "tokenizer_class is 'Evil', not PreTrainedTokenizerFast"),
    (TEMPLATE, "", b"\xff", "no tokenizer can be made of"),
]


# --- chat templates: they are rendered, and run no code

IMPORT = "__builtins__['__import__']('os').mkdir('escaped')"
TEMPLATES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception.__init__.__globals__." + IMPORT + " }}",
    "{{ namespace.__init__.__globals__." + IMPORT + " }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{% include 'config.json' %}",
    "{% import '../outside' as x %}",
]


@pytest.mark.parametrize("text", TEMPLATES)
def test_templates_run_in_a_sandbox(sound, tmp_path, text):
    folder = forge(sound, tmp_path, TEMPLATE, "", text.encode())
    tokenizer = load_tokenizer(read_kit(folder))
    [error] = Encoder(tokenizer).encode(rows_from([{"prompt": "Why?", "completion": "So."}]))
    assert isinstance(error, DataError)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


CASES = [
    *((MANIFEST, *case) for case in (*MANIFESTS, *FORMS)),
    *((CONFIG, *case) for case in CONFIGS),
    *(*TENSORS, *TOKENIZERS),
]


@pytest.mark.parametrize(("name", "path", "value", "words"), CASES)
def test_forged_files(sound, tmp_path, name, path, value, words):
    refused(read_kit, forge(sound, tmp_path, name, path, value), name, words)


FAMILIES = [
    ("gpt2", "n_layer", 10**9, "n_layer is 1000000000, not a whole number"),
    ("gpt2", "add_cross_attention", True, "has no tensor .*crossattention"),
    ("opt", "do_layer_norm_before", "../x", "do_layer_norm_before is '../x'"),
]


@pytest.mark.parametrize(("family", "path", "value", "words"), FAMILIES)
def test_settings_of_other_families(tmp_path, family, path, value, words):
    kit = small_kit(tmp_path / "sound" / "kit", family).path
    refused(read_kit, forge(kit, tmp_path / "forged", CONFIG, path, value), CONFIG, words)


def test_the_untouched_copy_is_read(sound, tmp_path):
    assert read_kit(forge(sound, tmp_path, CONFIG, "", lambda data: data)).config == read_json(sound / CONFIG)


def test_a_sparse_terabyte_whose_header_and_manifest_agree(sound, tmp_path):
    folder = copied(sound, tmp_path / "kit")
    header, _ = header_of(folder / EMULATOR)
    header["lm_head.weight"]["shape"] = [10**6, 10**5]
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [end, end := end + 4 * math.prod(entry["shape"])]
    path = folder / EMULATOR
    write_header(path, header, b"")
    try:
        os.truncate(path, path.stat().st_size + end)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    manifest = read_json(folder / MANIFEST)
    manifest["files"][EMULATOR]["bytes"] = path.stat().st_size
    (folder / MANIFEST).write_bytes(canonical(manifest))
    refused(read_kit, folder, EMULATOR)
