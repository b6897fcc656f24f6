"""Kits that would exhaust memory, time or disk: each is refused in a process with limits, and by the check against it.

Limits of the subprocess for tokenizers and templates are tested in test_limited.py.
"""

import os
import sys

import pytest
from support.hostile import defused, forge
from support.kits import copied, header_of, read_json, small_kit, write_header
from support.tokenizer import CHATML

from siftune.offsite.kit.folder import read_kit
from siftune.offsite.kit.limited import Limits
from siftune.offsite.kit.manifest import canonical

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
MANIFEST, CONFIG, TEMPLATE = "manifest.json", "config.json", "chat_template.jinja"
TOKENIZER, EMULATOR = "tokenizer.json", "emulator.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_kit(tmp_path_factory.mktemp("sound") / "kit").path


def replacements(count):
    """Each doubles the text."""
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [one] * count}


def splits(pattern, count=1):
    one = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda last: {"type": "Sequence", "pretokenizers": [one] * count + [last]}


def endless(body):
    return (body + CHATML).encode()


ENTRY = {"shape": [1], "dtype": "F32"}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
BOMBS = [
    # sizes of files
    (MANIFEST, "", lambda data: data + b" " * (4 << 20), "bytes, more than the 4194304 that are allowed"),
    # depth
    (MANIFEST, "", b'{"siftune_kit":' * 100_000, "more than 32 levels of nesting"),
    (TOKENIZER, "", b'{"a":' * 1_000_000, "more than 32 levels of nesting"),
    # numbers
    (MANIFEST, "", b'{"siftune_kit": ' + b"9" * 1_000_000 + b"}", "a number has 1000000 digits"),
    (MANIFEST, "middle/0/channels", 10**8, "but the model of config.json and manifest.json says F32 .32, 100000000."),
    (CONFIG, "hidden_size", 10**8, "emulator.safetensors: lm_head.weight"),
    (CONFIG, "head_dim", 10**8, "the model would compute 400000000 bytes of buffers"),
    # counts
    (MANIFEST, "adapter", {f"first.0.{n}": ENTRY for n in range(10_000)}, "adapter.safetensors has no tensor"),
    (TOKENIZER, "model/vocab", {f"t{n}": n for n in range(100_000)}, "of 320 embeddings"),
    (TOKENIZER, "pre_tokenizer", splits("a", 10_000), "pretokenizers has 10001 items; it must be a list of at most 64"),
    # texts that grow, and patterns that do not end
    (TOKENIZER, "normalizer", replacements(36), "normalizer.normalizers.0 is"),
    (TOKENIZER, "pre_tokenizer", splits(r"(?:(?:\w|\s)+)+\1zz|((?:\w+\s?)+)+$"), "it fails when a text of"),
    # templates
    (TEMPLATE, "", endless(LOOP), "1 s of processor time, was ended by SIGPROF"),
    (TEMPLATE, "", endless("{{ 10 ** (10 ** 8) }}"), "1 s of processor time, was ended by SIGPROF"),
    (TEMPLATE, "", endless(DOUBLING + "{{ n.s }}"), "more than 256 MB of memory"),
    (TEMPLATE, "", endless("{{ 'a' * 5 * 10**8 }}"), "more than 256 MB of memory"),
    (TEMPLATE, "", endless("{{ 'x' * 10**6 }}"), "a conversation of user"),
]


@pytest.mark.parametrize(("name", "path", "value", "words"), BOMBS)
def test_bombs(sound, tmp_path, monkeypatch, name, path, value, words):
    # a slow machine must not reach the limit of time before that of memory
    seconds = 1 if words.startswith("1 s of processor time") else 60
    monkeypatch.setattr("siftune.offsite.kit.template.LIMITS", Limits(memory_mb=256, cpu_s=seconds, wall_s=200))
    defused(read_kit, forge(sound, tmp_path, name, path, value), name, words)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_headers_that_claim_to_be_long(sound, tmp_path, length):
    folder = forge(sound, tmp_path, EMULATOR, "", lambda data: length.to_bytes(8, "little") + data[8:])
    defused(read_kit, folder, EMULATOR, f"the length of its header is {length}")


def test_a_sparse_terabyte_whose_header_and_manifest_agree(sound, tmp_path):
    folder = copied(sound, tmp_path / "kit")
    header, _ = header_of(folder / EMULATOR)
    header["lm_head.weight"]["shape"] = [10**6, 10**5]
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 4
            for length in entry["shape"]:
                size *= length
            entry["data_offsets"] = [end, end := end + size]
    path = folder / EMULATOR
    write_header(path, header, b"")
    try:
        os.truncate(path, path.stat().st_size + end)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    manifest = read_json(folder / MANIFEST)
    manifest["files"][EMULATOR]["bytes"] = path.stat().st_size
    (folder / MANIFEST).write_bytes(canonical(manifest))
    defused(read_kit, folder, EMULATOR, "lm_head.weight is F32 .1000000, 100000., but the model")
