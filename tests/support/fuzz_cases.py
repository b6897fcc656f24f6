"""Mutations of kits and returns whose sizes and hashes a forger has repaired, by class; the same in every run."""

import dataclasses
import json
import random
import struct

import torch
from support.damage import at, byte_mutations, dump, mutations, places, some_of, with_value
from support.fuzz_folders import signatures, swaps, versions
from support.fuzz_forged import Forger, channels, factors, formats, layers, numbers, promises, ranks, sizes
from support.fuzz_kits import HALF, RETURN, SUBJECTS, THIN
from support.fuzz_numbers import extremes, ruinous
from support.fuzz_returns import returns, votes
from support.fuzz_templates import waiting
from support.fuzz_texts import dumped, some, templates, tokenizer_configs, tokenizers
from support.fuzz_words import chains, normalizers, patterns
from support.kits import header_of

KIT = "llama"  # most mutations are of this kit; settings are tried in all families
MANIFEST, CONFIG, TEMPLATE = "manifest.json", "config.json", "chat_template.jinja"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
EMULATOR, OUTER = "emulator.safetensors", "adapter.safetensors"

VALUES = (
    *(0, 1, 2, 3, 5, 7, 8, 64, 319, 320, -1, 10**6, 10**8, 10**9, 10**30, 0.0, -0.0, 1.0, 0.5, -0.5, 4.0, 1e-320, 1e-9),
    *(
        0.99,
        1e3,
        1e9,
        1e300,
        True,
        False,
        None,
        "silu",
        "relu",
        "xielu",
        "full_attention",
        "float16",
        "",
        [],
        [1],
        [0.0],
    ),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mutation.

    Attributes:
        subject: Name of the sound folder, see `fuzz_kits`.
        what: What was done.
        files: Name -> new content, or None to remove it.
        repaired: Whether the manifest was brought in line with it.
        later: Whether the rows are read years after the verification, too.
        key: Public key by which the kit is verified.
        beside: Further returns that it is plugged with.
        swap: Change of a file while the folder is read.
    """

    subject: str
    what: str
    files: dict
    repaired: bool = True
    later: bool = False
    key: str = ""
    beside: tuple = ()
    swap: object = None


def _json(sound, subject, name):
    return json.loads((sound / subject / name).read_bytes())


def _one(subject, name, pairs, repaired=True):
    """Cases that change one file."""
    return [Case(subject, f"{name}: {what}", {name: data}, repaired) for what, data in pairs]


def with_bytes(sound, generator):
    """Bits flipped, pieces cut out, in every file of a kit and a return."""
    of_kit = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, EMULATOR, OUTER)
    for subject, names in ((KIT, of_kit), (RETURN, (OUTER,)), (THIN, (OUTER,))):
        for name in names:
            data = (sound / subject / name).read_bytes()
            pairs = [pair for pair in byte_mutations(data, generator, 12) if pair[1] != data]
            yield from _one(subject, name, pairs)


def manifests(sound, generator):
    """Values, keys and lists of manifests; whole numbers as floats and truth values, and others of a sane size."""
    for subject in (KIT, RETURN, THIN):
        whole = _json(sound, subject, MANIFEST)
        among = some_of(whole["adapter"], generator) if subject == KIT else lambda path: True
        pairs = some(mutations(whole, among), 90 if subject == KIT else 40, generator)
        for path in filter(among, places(whole)):
            if type(old := at(whole, path)) is int and "bytes" not in path:
                new = (float(old), bool(old), old + 1, old - 1, 2 * old)
                pairs += [(f"{path} = {value!r}", with_value(whole, path, value)) for value in new]
        yield from _one(subject, MANIFEST, dumped(pairs), repaired=False)


def configs(sound, generator):
    """Every setting of every family: values that are wild, and values beside the sound ones."""
    for subject in SUBJECTS:
        whole = _json(sound, subject, CONFIG)
        wild, near = [], []
        for path in filter(None, places(whole)):
            old = at(whole, path)
            for chosen, among in ((wild, VALUES), (near, _beside(old))):
                new = [value for value in among if repr(value) != repr(old)]
                chosen += [(f"{path} = {value!r}", with_value(whole, path, value)) for value in new]
        pairs = some(wild, 36, generator) + some(near, 24, generator) + some(mutations(whole), 10, generator)
        yield from _one(subject, CONFIG, dumped(pairs))


def _beside(old):
    """Other values of the same kind."""
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int):
        return [old + 1, old - 1, 2 * old, old // 2]
    if isinstance(old, float):
        return [0.5 * old, 2 * old, old + 0.1, 10 * old]
    if isinstance(old, list):
        return [old[::-1], old[:1] * len(old), old[:-1]]
    return ["gelu", "relu", "gelu_10"] if isinstance(old, str) else [1, 2, 0.5, True, 31]


_NEEDED = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "proportional": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
_MORE = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor")


def rotary(sound, generator):
    """Rotary settings of every kind: half of them with sane numbers, and lists of which the length may be wrong."""
    for turn in range(80):
        subject = generator.choice(["llama", "mistral", "qwen3", "gpt_neox", "gemma3_text"])
        whole, wild, kind = _json(sound, subject, CONFIG), turn % 2, generator.choice([*_NEEDED])
        settings = {"rope_type": kind, "rope_theta": generator.choice((1e4, 500000, 2, 1e12))}
        for name in (*_NEEDED[kind], *generator.sample(_MORE, turn % 3)):
            settings[name] = generator.choice(VALUES) if wild else generator.choice((1, 1.0, 1.5, 4, 32.0, 64))
        if not wild and kind == "llama3":
            settings["low_freq_factor"], settings["high_freq_factor"] = 1.0, 4.0
        for name in {"short_factor", "long_factor", "original_max_position_embeddings"} & settings.keys():
            length = generator.choice((2, 4, 4, 4, 5))
            settings[name] = generator.choice((2, 16, 32, 64)) if name[0] == "o" else [settings[name]] * length
        if subject == "gemma3_text":
            settings = {**whole["rope_parameters"], "full_attention": settings}
        yield from _one(subject, CONFIG, [(f"rotary {settings}", dump({**whole, "rope_parameters": settings}))])


def _with_header(text, data):
    return len(text).to_bytes(8, "little") + text + data


def header_mutations(header, generator):
    """Changes of a header, none of which is sound for these data."""
    names = [name for name in header if name != "__metadata__"]
    yield from mutations(header, some_of(names, generator, 1))
    for _ in range(8):
        a, b = generator.sample(names, 2)
        if header[a]["shape"] != header[b]["shape"]:
            yield f"{a} and {b} change names", {**header, a: header[b], b: header[a]}
        yield f"{a} lies on {b}", {**header, a: {**header[a], "data_offsets": header[b]["data_offsets"]}}
        if len(header[a]["shape"]) == 2 and len(set(header[a]["shape"])) == 2:
            yield f"{a} transposed", {**header, a: {**header[a], "shape": header[a]["shape"][::-1]}}
        yield f"{a} has a dimension more", {**header, a: {**header[a], "shape": [*header[a]["shape"], 1]}}
    for dtype in ("I32", "U32", "F64", "BF16", "F8_E4M3", "f32", "BOOL"):
        yield dtype, {**header, names[0]: {**header[names[0]], "dtype": dtype}}
        every = {n: entry if n == "__metadata__" else {**entry, "dtype": dtype} for n, entry in header.items()}
        yield f"all {dtype}", every


def headers(sound, generator):
    """Headers of tensor files: what they say, how it is written, and how long they are."""
    for subject, name in ((KIT, EMULATOR), (KIT, OUTER), (RETURN, OUTER), (THIN, OUTER)):
        header, data = header_of(sound / subject / name)
        pairs = [(what, value) for what, value in header_mutations(header, generator) if value != header]
        texts = dumped(some(pairs, 45, generator))
        plain = json.dumps(header)
        for number in ("-0", "0.0", "0e0", "00", "+0", "1e-400", '"0"', "0.", "false"):
            texts.append((f"0 as {number}", plain.replace("[0, ", f"[{number}, ", 1).encode()))
        shape = next(value["shape"] for key, value in header.items() if key != "__metadata__")
        texts += [(f"{shape[0]} as {n}", plain.replace(f"[{shape[0]}", f"[{n}", 1).encode()) for n in ("32.0", "32e0")]
        files = [(what, _with_header(text, data)) for what, text in texts]
        files += [
            (f"header of {n}", n.to_bytes(8, "little") + plain.encode() + data) for n in (0, 1, 7, 2**63, 2**64 - 1)
        ]
        whole = plain.encode()
        files += [(f"{len(cut)} bytes", _with_header(whole, cut)) for cut in (data + b"\0" * 4, data[:-4], b"")]
        yield from _one(subject, name, files)


_NUMBERS = (*(float("nan"), float("inf"), float("-inf"), 3e38, -1e38, 1e30, 65505.0, 65504.0, -6e4, 1e3, 1e-45, -0.0),)


def values(sound, generator):
    """Numbers in tensors: one that is none, infinite, huge or tiny; all of them zero, turned round or far too large."""
    for subject, name in ((KIT, EMULATOR), (KIT, OUTER), (HALF, EMULATOR), (RETURN, OUTER), (THIN, OUTER)):
        header, data = header_of(sound / subject / name)
        names = [key for key in header if key != "__metadata__"]
        text = json.dumps(header).encode()
        files = []
        for value in (*_NUMBERS, *_NUMBERS[:3]):
            begin, end = header[chosen := generator.choice(names)]["data_offsets"]
            half = header[chosen]["dtype"] == "BF16"
            piece = struct.pack("<f", value)[2:] if half else struct.pack("<f", value)
            place = begin + generator.randrange((end - begin) // len(piece)) * len(piece)
            files.append((f"{value} in {chosen}", data[:place] + piece + data[place + len(piece) :]))
        for factor in (0.0, -1.0, 1.02, 2.0, 1e4, 1e38):
            begin, end = header[chosen := generator.choice(names)]["data_offsets"]
            kind = torch.bfloat16 if header[chosen]["dtype"] == "BF16" else torch.float32
            tensor = torch.frombuffer(bytearray(data[begin:end]), dtype=kind) * factor
            changed = tensor.view(torch.uint8).numpy().tobytes()
            files.append((f"{chosen} times {factor}", data[:begin] + changed + data[end:]))
        yield from _one(subject, name, [(what, _with_header(text, changed)) for what, changed in files])


_FORGED = (
    (KIT, (ranks, channels, layers, sizes, formats, numbers)),
    (HALF, (ranks, formats, numbers)),
    *((family, (numbers,)) for family in ("gpt2", "gemma2", "opt", "gpt_neox")),
    (RETURN, (numbers, promises)),
    (THIN, (numbers, factors)),
)


def forged(sound, generator):
    """Folders of which several files were changed so that they fit each other."""
    for subject, kinds in _FORGED:
        forger = Forger(sound / subject, generator)
        for kind in kinds:
            yield from (Case(subject, what, other.files()) for what, other in kind(forger))


def texts_of(name, mutate):
    """Mutations of a text file: `mutate` is given its JSON, or its bytes where it is none."""

    def generate(sound, generator):
        data = (sound / KIT / name).read_bytes()
        yield from _one(KIT, name, mutate(json.loads(data) if name.endswith(".json") else data, generator))

    return generate


def templates_that_wait(sound, generator):
    """Templates that go by words, lengths, dates, roles, and by what is defined."""
    return [Case(KIT, what, {TEMPLATE: text}, later=later) for what, text, later in waiting()]


def made(generate, *args):
    """Mutations of a table of (subject, what, files)."""
    return lambda sound, generator: [Case(*parts) for parts in generate(sound, generator, *args)]


def odd_settings(sound, generator):
    """Legal settings that ruin a model."""
    return [Case(*parts) for parts in ruinous(sound, SUBJECTS)]


def other_versions(sound, generator):
    """Manifests of other protocols."""
    for subject, key in ((KIT, "siftune_kit"), (RETURN, "siftune_return")):
        data = (sound / subject / MANIFEST).read_bytes()
        yield from _one(subject, MANIFEST, versions(data, key), repaired=False)


def signed(sound, generator):
    """Signatures that are missing, another's, or damaged."""
    for what, files, repaired, key in signatures(sound, generator):
        yield Case("signed", what, files, repaired, key=key)


def swapped(sound, generator):
    """Files that are swapped while they are read."""
    return [Case(KIT, str(swap), {}, repaired=False, swap=swap) for swap in swaps(generator)]


def voted(sound, generator):
    """Returns beside themselves."""
    return [Case(*parts, beside=(parts[0],)) for parts in votes(sound, generator, RETURN, THIN)]


CLASSES = {
    "bytes": with_bytes,
    "manifests": manifests,
    "configs": configs,
    "rotary": rotary,
    "headers": headers,
    "values": values,
    "forged": forged,
    "tokenizers": texts_of(TOKENIZER, tokenizers),
    "tokenizer configs": texts_of(TOKENIZER_CONFIG, tokenizer_configs),
    "templates": texts_of(TEMPLATE, templates),
    "normalizers": texts_of(TOKENIZER, normalizers),
    "patterns": texts_of(TOKENIZER, patterns),
    "chains": texts_of(TOKENIZER, chains),
    "waiting templates": templates_that_wait,
    "ruinous": odd_settings,
    "extremes": made(extremes, (KIT, HALF)),
    "returns": made(returns, RETURN, THIN),
    "votes": voted,
    "versions": other_versions,
    "signatures": signed,
    "swaps": swapped,
}


def cases(name, sound):
    """All mutations of a class.

    Args:
        name: One of `CLASSES`.
        sound: Folder with the sound kits and the return.
    """
    return list(CLASSES[name](sound, random.Random(name)))
