"""Hostile kits: every case is refused by its check, in a sentence that names file and field, and nothing is written.

All hashes are right, unless they are what was changed. Fields of manifests and headers one by one are tested in
test_manifest.py and test_tensors.py, single parts of tokenizers and templates in test_tokenizer.py and
test_template.py.
"""

import os
import struct

import pytest
from support.hostile import REMOVED, forge, refused
from support.kits import copied, read_json, small_kit
from support.tokenizer import CHATML

from siftune.offsite.kit.folder import read_kit

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
    (f"middle/0/ranks/{Q}", 4, f"{Q}.down.weight is F32 .3, 32., but the model"),
    ("adapter", lambda table: table | {"first.../x": {}}, "the name of a tensor is 'first.../x'"),
    ("adapter", lambda table: dict([*table.items()][1:]), "has a tensor .*, which manifest.json: adapter lacks"),
    ("adapter/first.0.mlp.up_proj.weight/shape", [32, 48], "up_proj.weight is F32 .48, 32., but manifest"),
    ("files", lambda table: table | {"../outside": ENTRY}, "files has the unknown key '../outside'"),
    (f"files/{CONFIG}/path", "../outside", f"files.{CONFIG} has the unknown key 'path'"),
    (f"files/{CONFIG}/bytes", 2**63, f"files.{CONFIG}.bytes is 9223372036854775808, not a whole number"),
    (f"files/{CONFIG}/sha256", "0" * 64, f"{CONFIG} has the SHA-256"),
]


def with_text(old, new):
    return lambda data: data.replace(old, new, 1)


FORMS = [
    ("", with_text(b'"siftune_kit": 1', b'"siftune_kit": 1, "siftune_kit": 2'), "the key 'siftune_kit' occurs twice"),
    ("", with_text(b'"siftune_kit": 1', b'"siftune_kit": 1e0'), "siftune_kit is 1.0"),
    ("", with_text(b'"first": 1', b'"first": -0'), "a number is -0, not 0"),
    ("", with_text(b'"first": 1', b'"first": NaN'), "NaN is not a JSON number"),
    ("", with_text(b'"first": 1', b'"first": 1e999'), "'1e999' is too large"),
    ("", with_text(b'"rows"', b'"\\ud800"'), "half of a surrogate pair"),
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
    ("hidden_act", "xielu", "emulator.safetensors has no tensor .*act_fn.alpha_p"),
    ("auto_map", {"AutoConfig": "code.py--Config"}, "config.json has the key 'auto_map'"),
    ("_attn_implementation", "someone/kernel", "config.json has the key '_attn_implementation'"),
    ("vocab_size", True, "config.json: vocab_size is True, not a whole number"),
    ("vocab_size", 320.0, "config.json: vocab_size is 320.0, not a whole number"),
    ("vocab_size", 319, "emulator.safetensors: lm_head.weight .* says F32 .319, 32."),
    ("num_hidden_layers", 6, "config.json: num_hidden_layers is 6, but 5 by split and middle"),
    ("num_hidden_layers", REMOVED, "config.json has no num_hidden_layers"),
    ("dtype", "float64", "config.json: dtype is 'float64', but float32"),
    ("rms_norm_eps", 0, "config.json: rms_norm_eps is 0, not a number from 1e-12"),
    ("pad_token_id", 320, "config.json: pad_token_id is 320, but the last of 320 tokens"),
    ("tie_word_embeddings", True, "emulator.safetensors has a tensor 'lm_head.weight', which .* lacks"),
    ("rope_parameters/rope_theta", 0, "config.json: rope_parameters make cosines that are not finite"),
    ("", b"[]", r"config.json: model_type is \[\]"),
    ("", with_text(b'"vocab_size"', b'"vocab_size": 1, "vocab_size"'), "config.json .*key 'vocab_size' occurs twice"),
]


# --- tensor files: sizes and places of tensors, and their numbers


def with_number(value):
    """The last number of the file."""
    return lambda data: data[:-4] + struct.pack("<f", value)


TENSORS = [
    (EMULATOR, "lm_head.weight/shape", [32, 320], "lm_head.weight is F32 .32, 320., but the model"),
    (EMULATOR, "lm_head.weight/shape", [320, 33], "header.lm_head.weight.data_offsets span"),
    (EMULATOR, "lm_head.weight/shape", [True, 10240], "header.lm_head.weight.shape is True, not a whole number"),
    (EMULATOR, "lm_head.weight/dtype", "I32", "header.lm_head.weight.dtype is 'I32'"),
    (EMULATOR, "lm_head.weight", REMOVED, "header: the data_offsets leave gaps, overlap"),
    (EMULATOR, "model.embed_tokens.weight/data_offsets", [0, 40960], "header: the data_offsets leave gaps, overlap"),
    (EMULATOR, "lm_head.weight/data_offsets", [-40960, 0], "header.lm_head.weight.data_offsets is -40960"),
    (EMULATOR, "lm_head.weight/data_offsets", [2**40, 2**40 + 40960], "header.lm_head.weight.data_offsets is 1099511"),
    (EMULATOR, "__metadata__/author", "x", "header.__metadata__ is not"),
    (EMULATOR, "", lambda data: data + bytes(4), "header: the data_offsets leave gaps, overlap, or do not end"),
    (EMULATOR, "", with_text(b"[0,", b"[-0,"), "header is not proper JSON .a number is -0"),
    (EMULATOR, "", with_text(b"lm_head.weight", b"../../../lm_he"), "the name of a tensor is '../../../lm_he'"),
    (EMULATOR, "", with_number(float("nan")), "model.norm.weight has values that are NaN or infinite"),
    (OUTER, "", with_number(-65505.0), "v_proj.weight has the value 65505; up to 65504 is allowed"),
]


# --- tokenizers

NOT = {"type": "Replace", "pattern": {"String": "not "}, "content": ""}
SPLIT = {"type": "Split", "pattern": {"Regex": "not"}, "behavior": "Removed", "invert": False}
TOKENIZERS = [
    (TOKENIZER, "normalizer", NOT, "normalizer is"),
    (TOKENIZER, "decoder", NOT, "decoder is"),
    (TOKENIZER, "pre_tokenizer", lambda last: {"type": "Sequence", "pretokenizers": [SPLIT, last]}, "changes a text"),
    (TOKENIZER, "post_processor", {"type": "ByteLevel", "code": "x"}, "post_processor has the unknown key 'code'"),
    (TOKENIZER, "model/dropout", 0.5, "model.dropout is 0.5; a tokenizer must not draw"),
    (TOKENIZER, "model/vocab/zz", 5, "are both token 5"),
    (TOKENIZER, "model/vocab/e", REMOVED, "changes a text"),
    (TOKENIZER, "", b"\xff", "cannot be used"),
    (TOKENIZER_CONFIG, "auto_map", {"AutoTokenizer": ["code.py", None]}, "has the unknown key 'auto_map'"),
    (TOKENIZER_CONFIG, "tokenizer_file", "/etc/passwd", "has the unknown key 'tokenizer_file'"),
    (TOKENIZER_CONFIG, "model_max_length", True, "model_max_length is True, not a whole number"),
    (TOKENIZER_CONFIG, "pad_token", "<new>", "special token '<new>'; tokenizer.json has none"),
]


# --- chat templates

IMPORT = "__builtins__['__import__']('os').mkdir('escaped')"
TEMPLATES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception.__init__.__globals__." + IMPORT + " }}",
    "{{ namespace.__init__.__globals__." + IMPORT + " }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{% include 'config.json' %}",
    "{% import '../outside' as x %}",
    "{{ ['', 'x'] | random }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ '\\ud800' }}",
]


CASES = [
    *((MANIFEST, *case) for case in (*MANIFESTS, *FORMS)),
    *((CONFIG, *case) for case in CONFIGS),
    *(*TENSORS, *TOKENIZERS),
    *((TEMPLATE, "", (text + CHATML).encode(), "fails on it|is no template|cannot be used") for text in TEMPLATES),
]


@pytest.mark.parametrize(("name", "path", "value", "words"), CASES)
def test_forged_files(sound, tmp_path, name, path, value, words):
    refused(read_kit, forge(sound, tmp_path, name, path, value), name, words)


FAMILIES = [
    ("gpt2", "n_layer", 10**9, "n_layer is 1000000000, not a whole number"),
    ("gpt2", "resid_pdrop", 1, "resid_pdrop is 1; it must be below 1"),
    ("gpt2", "add_cross_attention", True, "add_cross_attention is True"),
    ("opt", "ffn_dim", 0, "ffn_dim is 0, not a whole number"),
    ("opt", "do_layer_norm_before", "../x", "do_layer_norm_before is '../x'"),
    ("gpt_neox", "layer_norm_eps", -1e-5, "layer_norm_eps is -1e-05, not a number"),
    ("gemma2", "final_logit_softcapping", 0, "final_logit_softcapping is 0, not a number"),
    ("gemma2", "sliding_window", None, "layer_types has sliding_attention, but there is no sliding_window"),
    ("gemma3_text", "rope_parameters/full_attention/factor", {}, "rope_parameters.full_attention.factor is {}"),
    ("gemma3_text", "use_bidirectional_attention", True, "use_bidirectional_attention is True"),
]


@pytest.mark.parametrize(("family", "path", "value", "words"), FAMILIES)
def test_settings_of_other_families(tmp_path, family, path, value, words):
    kit = small_kit(tmp_path / "sound" / "kit", family).path
    refused(read_kit, forge(kit, tmp_path / "forged", CONFIG, path, value), CONFIG, words)


def test_the_untouched_copy_is_read(sound, tmp_path):
    assert read_kit(forge(sound, tmp_path, CONFIG, "", lambda data: data)).config == read_json(sound / CONFIG)
