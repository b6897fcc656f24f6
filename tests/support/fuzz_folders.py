"""Folders as a whole: manifests of other versions, signatures, and files that are swapped while they are read."""

import base64
import contextlib
import copy
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

from support.damage import dump, mutations
from support.fuzz_forged import PROMISE

FILES = (
    *("manifest.json", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("emulator.safetensors", "adapter.safetensors"),
)
SIGNATURE = "kit.sig"


def versions(data, key):
    """Manifests of other protocols and in other forms: (what, bytes); `key` names the protocol."""
    whole = json.loads(data)
    other = "siftune_return" if key == "siftune_kit" else "siftune_kit"
    for value in (0, 2, 3, -1, 1.0, "1", "1.0", "v1", True, None, [1], {"major": 1}, 10**30, 1.5, [], "2026-01-01"):
        yield f"protocol {value!r}", dump({**whole, key: value})
    rest = {name: value for name, value in whole.items() if name != key}
    yield "no protocol", dump(rest)
    yield "the other kind", dump({**rest, other: 1})
    yield "both kinds", dump({**whole, other: 1})
    for name in (key.upper(), f"{key}_version", "version", "protocol", "\ufeff" + key, key + " "):
        yield f"protocol as {name!r}", dump({**rest, name: 1})
    for name, value in (
        ("min_version", 1), ("format", "kit"), ("author", "owner"), ("outer", {}), ("extensions", []),
        ("privacy", PROMISE), ("lora", {}),
        ("weights_sha512", "0" * 128), ("license", "x"), ("__proto__", {}), ("", 1), ("auto_map", {}),
        ("siftune_kit ", 1), ("signature", "x"), ("created", "2026-01-01"),
    ):  # fmt: skip
        yield f"more: {name}", dump({**whole, name: value})
    for name in whole:
        yield f"without {name}", dump({key: value for key, value in whole.items() if key != name})
    if "adapter" in whole:
        renamed = {("outer" if name == "adapter" else name): value for name, value in whole.items()}
        yield "outer, not adapter", dump(renamed)
    for name in whole["files"]:
        for more in ({"sha512": "0" * 128}, {"mode": 493}, {"sha256": whole["files"][name]["sha256"].upper()}):
            changed = copy.deepcopy(whole)
            changed["files"][name] |= more
            yield f"files.{name}: {more}", dump(changed)
    plain = json.dumps(whole, sort_keys=True)
    yield from {
        "compact": plain.encode(),
        "indent 4": json.dumps(whole, indent=4, sort_keys=True).encode() + b"\n",
        "other order": json.dumps(dict(reversed(whole.items())), indent=2).encode() + b"\n",
        "CRLF": data.replace(b"\n", b"\r\n"),
        "no end of line": data.rstrip(b"\n"),
        "two ends of line": data + b"\n",
        "a mark": b"\xef\xbb\xbf" + data,
        "UTF-16": data.decode().encode("utf-16"),
        "UTF-32": data.decode().encode("utf-32-le"),
        "escapes": data.replace(b'"files"', b'"f\\u0069les"'),
        "a comment": data + b"// version 2\n",
        "two of them": data + data,
        "the protocol twice": data.replace(b"{\n", b'{\n  "%s": 2,\n' % key.encode(), 1),
        "the protocol as 1e0": data.replace(b'"%s": 1' % key.encode(), b'"%s": 1e0' % key.encode()),
        "a tab": data.replace(b"\n  ", b"\n\t", 1),
        "zeros": data + b"\0" * 16,
        "YAML": b"siftune_kit: 1\n",
        "an old list": dump([whole]),
        "null": b"null\n",
    }.items()


def _payload(signature, change):
    """A signature whose signed statement was changed, and not signed again."""
    whole = json.loads(signature)
    envelope = whole["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps(whole).encode()


def signatures(sound, generator):
    """(what, files, repaired, key) of the signed folder; the twin is signed by the same key."""
    own, owner, foreign = "signed", "owner.pub.pem", "foreign.pub.pem"
    signature = (sound / own / SIGNATURE).read_bytes()
    replayed, others = ((sound / name / SIGNATURE).read_bytes() for name in ("signed.twin", "signed.foreign"))
    whole = json.loads(signature)
    twin = {name: (sound / "signed.twin" / name).read_bytes() for name in FILES}
    texts = {
        "stripped": None, "replayed": replayed, "of another key": others, "empty": b"", "null": b"null", "{}": b"{}",
        "a list": b"[]", "cut": signature[:-40], "twice": signature * 2, "zeros": b"\0" * 500,
        "spaces": b" " + signature,
        "deep": b"[" * 50_000, "no JSON": b"\xff" * 90,
    }  # fmt: skip
    for what, change in {
        "no subject": lambda s: s.update(subject=[]),
        "another name": lambda s: s["subject"][0].update(name="x"),
        "another digest": lambda s: s["subject"][0].update(digest={"sha256": "0" * 64}),
        "fewer resources": lambda s: s["predicate"]["resources"].pop(),
        "more resources": lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]),
        "another hash": lambda s: s["predicate"]["resources"][0].update(digest="0" * 64),
        "another algorithm": lambda s: s["predicate"]["resources"][0].update(algorithm="md5"),
        "another path": lambda s: s["predicate"]["resources"][0].update(name="../x"),
        "all ignored": lambda s: s["predicate"]["serialization"].update(ignore_paths=[*FILES]),
        "shards": lambda s: s["predicate"]["serialization"].update(method="shards", shard_size=1),
        "another type": lambda s: s.update(predicateType="https://example.org/v9"),
        "of another version": lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
    }.items():
        texts[what] = _payload(signature, change)
    envelope = whole["dsseEnvelope"]
    for what, part in {
        "no signatures": {"signatures": []},
        "two signatures": {"signatures": envelope["signatures"] * 2},
        "the replayed one's": {"signatures": json.loads(replayed)["dsseEnvelope"]["signatures"]},
        "the foreign one's": {"signatures": json.loads(others)["dsseEnvelope"]["signatures"]},
        "both": {"signatures": [*json.loads(others)["dsseEnvelope"]["signatures"], *envelope["signatures"]]},
        "another payload type": {"payloadType": "text/plain"},
        "the replayed one's payload": {"payload": json.loads(replayed)["dsseEnvelope"]["payload"]},
        "no payload": {"payload": ""},
    }.items():
        texts[what] = json.dumps({**whole, "dsseEnvelope": {**envelope, **part}}).encode()
    texts |= {what: dump(value) for what, value in generator.sample([*mutations(whole)], 30)}
    for what, text in texts.items():
        yield f"signature {what}", {SIGNATURE: text}, False, owner
        if what in ("stripped", "replayed", "of another key", "null", "cut"):
            yield f"signature {what}, no key", {SIGNATURE: text}, False, ""
        if what in ("stripped", "replayed", "cut"):
            yield f"signature {what}, another key", {SIGNATURE: text}, False, foreign
    yield "the right signature, another key", {}, False, foreign
    for name in FILES:
        for repaired in (False, True):
            if name != "manifest.json" or not repaired:
                yield f"{name} of the twin, {repaired}", {name: twin[name]}, repaired, owner
    yield "all of the twin but the signature", twin, False, owner
    yield "an unsigned file more", {"model.py": b"x"}, False, owner


@dataclasses.dataclass(frozen=True)
class Swap:
    """A file that becomes the twin's, just before the folder's files are opened for a certain time.

    Attributes:
        name: The file; empty for the complete folder.
        at: Number of the opening before which this happens, from 1.
        moved: Whether another file takes its place; else its content is overwritten.
    """

    name: str
    at: int
    moved: bool

    @contextlib.contextmanager
    def begin(self, target, sound):
        """Wait for the moment."""
        _hook()
        _waiting.append([self, str(target), Path(sound) / "twin", 0])
        try:
            yield
        finally:
            _waiting.clear()

    def happen(self, target, twin):
        """Do it."""
        if not self.name:
            Path(target).rename(f"{target}.old")
            shutil.copytree(twin, target)
        elif self.moved:
            shutil.copy(twin / self.name, f"{target}.beside")
            os.replace(f"{target}.beside", Path(target, self.name))
        else:
            Path(target, self.name).write_bytes((twin / self.name).read_bytes())


_waiting, _hooked = [], []


def _hook():
    """Watch the openings of files, of this process; a hook cannot be taken off again."""
    if not _hooked:
        sys.addaudithook(_opened)
        _hooked.append(True)


def _opened(event, args):
    if event == "open" and _waiting and isinstance(args[0], str | Path):
        swap, target, twin, _ = _waiting[0]
        if Path(args[0]).parent == Path(target):
            _waiting[0][3] += 1
            if _waiting[0][3] == swap.at:
                _waiting.clear()
                swap.happen(target, twin)


def swaps(generator):
    """Every file, swapped at several moments."""
    for name in (*FILES, ""):
        for moved in (True, False) if name else (True,):
            yield from (Swap(name, at, moved) for at in sorted(generator.sample(range(1, 26), 10)))
