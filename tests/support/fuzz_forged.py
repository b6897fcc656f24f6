"""Kits and returns that were forged whole: config, manifest and tensors fit each other, and are not what was sent."""

import copy

import torch
from safetensors.torch import load, save
from support.damage import dump
from support.kits import read_json

MANIFEST, CONFIG = "manifest.json", "config.json"
EMULATOR, OUTER = "emulator.safetensors", "adapter.safetensors"
OF_ALL = "all of it times"  # numbers that are sound one by one; what a model makes of them, no look at them tells
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Forger:
    """The parts of a folder, to be changed together.

    Args:
        folder: A sound kit or return.
        generator: Of new numbers.
    """

    def __init__(self, folder, generator):
        names = [name for name in (EMULATOR, OUTER) if (folder / name).exists()]
        self.tensors = {name: load((folder / name).read_bytes()) for name in names}
        self.manifest = read_json(folder / MANIFEST)
        self.config = read_json(folder / CONFIG) if EMULATOR in names else None
        self._generator = torch.Generator().manual_seed(generator.randrange(2**32))

    def copy(self):
        """Another one, to be changed by itself."""
        return copy.deepcopy(self)

    def sized(self, tensor, *shape):
        """A tensor of another shape, with as much of the old one as fits."""
        new = 0.02 * torch.randn(shape, generator=self._generator).to(tensor.dtype)
        both = tuple(slice(0, min(old, size)) for old, size in zip(tensor.shape, shape, strict=True))
        new[both] = tensor[both]
        return new

    def files(self):
        """Name -> bytes; sizes and hashes in the manifest are for `repair`."""
        files = {name: save(tensors, {"format": "pt"}) for name, tensors in self.tensors.items()}
        if self.config is not None:
            files[CONFIG] = dump(self.config)
        return files | {MANIFEST: dump(self.manifest)}


def _resized(forger, ends, change):
    """Change the shapes of the tensors whose names end so."""
    frozen = forger.tensors[EMULATOR]
    for name in [name for name in frozen if name.endswith(tuple(ends))]:
        frozen[name] = forger.sized(frozen[name], *change(frozen[name].shape))


def ranks(forger):
    """Another rank of the first layer's queries."""
    for rank in (1, 2, 16, 32, 33, 64):
        other, path = forger.copy(), "layers.1.self_attn.q_proj"
        _resized(other, [f"{path}.down.weight"], lambda shape, rank=rank: (rank, shape[1]))
        _resized(other, [f"{path}.up.weight"], lambda shape, rank=rank: (shape[0], rank))
        other.manifest["middle"][0]["ranks"]["self_attn.q_proj"] = rank
        yield f"rank {rank}", other


def channels(forger):
    """Another number of channels."""
    for count in (1, 9, 48, 49, 300):
        other, path = forger.copy(), "layers.1.mlp."
        _resized(other, [f"{path}{name}_proj.weight" for name in ("gate", "up")], lambda s, n=count: (n, s[1]))
        _resized(other, [f"{path}down_proj.weight"], lambda s, n=count: (s[0], n))
        other.manifest["middle"][0]["channels"] = count
        yield f"{count} channels", other


def layers(forger):
    """Layers of the middle that are gone, or are more than the base's."""
    for kept in ([0], [0, 1], [0, 2], [0, 1, 2, 2]):
        other = forger.copy()
        other.manifest["middle"] = [copy.deepcopy(forger.manifest["middle"][place]) for place in kept]
        other.config["num_hidden_layers"] = 2 + len(kept)
        frozen = forger.tensors[EMULATOR]
        other.tensors[EMULATOR] = {n: t for n, t in frozen.items() if "layers." not in n}
        for new, old in enumerate(kept, 1):
            before, after = f"layers.{old + 1}.", f"layers.{new}."
            other.tensors[EMULATOR] |= {n.replace(before, after): t.clone() for n, t in frozen.items() if before in n}
        yield f"layers {kept} of the middle", other


def sizes(forger):
    """Another vocabulary, other heads, wider MLPs, another window."""
    for count in (1, 100, 259, 260, 1000):
        other = forger.copy()
        _resized(other, ["embed_tokens.weight", "lm_head.weight"], lambda s, n=count: (n, s[1]))
        other.config["vocab_size"] = count
        yield f"{count} embeddings", other
    for heads, shared, width in ((2, 1, 16), (32, 16, 1), (8, 4, 4), (16, 8, 2)):
        other = forger.copy()
        other.config |= {"num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": width}
        yield f"{heads} heads", other
    other = forger.copy()
    for name, tensor in other.tensors[OUTER].items():
        at = {"down_proj.weight": 1, "gate_proj.weight": 0, "up_proj.weight": 0}.get(name.partition("mlp.")[2])
        if at is not None:
            shape = [96 if place == at else size for place, size in enumerate(tensor.shape)]
            other.tensors[OUTER][name] = other.sized(tensor, *shape)
            other.manifest["adapter"][name]["shape"] = shape
    other.config["intermediate_size"] = 96
    yield "wider MLPs", other
    for length in (1, 2, 10**6):
        other = forger.copy()
        other.config["max_position_embeddings"] = length
        yield f"a window of {length}", other


def formats(forger):
    """Other number formats of either file, and a head that is the embeddings."""
    for name, kind in DTYPES.items():
        frozen, outer, word = (
            forger.copy(),
            forger.copy(),
            {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[name],
        )
        frozen.tensors[EMULATOR] = {n: t.to(kind) for n, t in frozen.tensors[EMULATOR].items()}
        frozen.config["dtype"] = name
        yield f"frozen part in {name}", frozen
        outer.tensors[OUTER] = {n: t.to(kind) for n, t in outer.tensors[OUTER].items()}
        outer.manifest["adapter"] = {n: {**e, "dtype": word} for n, e in outer.manifest["adapter"].items()}
        yield f"layers to tune in {name}", outer
    tied = forger.copy()
    del tied.tensors[EMULATOR]["lm_head.weight"]
    tied.config["tie_word_embeddings"] = True
    yield "tied", tied


def numbers(forger):
    """All numbers of a file at once, each of which may be by itself."""
    for name, tensors in forger.tensors.items():
        largest = max(float(tensor.abs().max()) for tensor in tensors.values())
        for factor in (0.0, -1.0, 0.01, 100.0, 1e4, 65504 / largest * 0.999):
            other = forger.copy()
            other.tensors[name] = {n: (t * factor).clamp(-65504, 65504) for n, t in tensors.items()}
            yield f"{name}: {OF_ALL} {factor:.3g}", other


def factors(forger):
    """Returns of factors with other ranks, and with fewer or no matrices."""
    table, tensors = forger.manifest["lora"], forger.tensors[OUTER]
    for rank in (1, 3, 5, 11, 16, 40):
        other = forger.copy()
        for name in table:
            up, down = (tensors[f"{name}.{end}"] for end in ("up", "down"))
            other.tensors[OUTER][f"{name}.up"] = other.sized(up, len(up), rank)
            other.tensors[OUTER][f"{name}.down"] = other.sized(down, rank, down.shape[1])
            other.manifest["lora"][name] = rank
        yield f"factors of rank {rank}", other
    for kept in ([], sorted(table)[:1], sorted(table)[3:]):
        other = forger.copy()
        other.manifest["lora"] = {name: table[name] for name in kept}
        other.tensors[OUTER] = {n: t for n, t in tensors.items() if n.rpartition(".")[0] in kept}
        if kept or not other.tensors[OUTER]:
            yield f"{len(kept)} matrices", other


PROMISE = {
    "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.0, "clip": 1.0, "sampling_rate": 0.1,
    "expected_batch": 4, "steps": 3, "accountant": "opacus PRV", "accountant_version": "1.5.4",
    "unit": "one training row, there or not",
}  # fmt: skip


def promises(forger):
    """Statements on privacy, of which values are out of range, of other types, or not there."""
    for name in PROMISE:
        for value in (None, -1, 0, 1, 1.0, True, 1e308, "x\n", [], {"a": 1}, "\u202e"):
            other = forger.copy()
            other.manifest["privacy"] = {**PROMISE, name: value}
            yield f"privacy: {name} is {value!r}", other
        other = forger.copy()
        other.manifest["privacy"] = {key: value for key, value in PROMISE.items() if key != name}
        yield f"privacy without {name}", other
