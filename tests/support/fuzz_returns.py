"""Returns whose numbers stay within the limits, in odd factors and under odd names; and returns given twice."""

import json

import torch
from safetensors.torch import save
from support.damage import dump
from support.fuzz_forged import OUTER, PROMISE, Forger


def _pairs(forger):
    """(Up, down) of each matrix."""
    tensors = forger.tensors[OUTER]
    return {name: (tensors[f"{name}.up"], tensors[f"{name}.down"]) for name in forger.manifest["lora"]}


def _put(forger, name, up, down):
    forger.tensors[OUTER] |= {f"{name}.up": up.contiguous(), f"{name}.down": down.contiguous()}
    forger.manifest["lora"][name] = up.shape[1]


def _each(change):
    """Change both factors of every matrix."""

    def apply(forger):
        for name, (up, down) in _pairs(forger).items():
            _put(forger, name, *change(up, down))

    return apply


def _turned(up, down):
    q, _ = torch.linalg.qr(torch.randn(up.shape[1], up.shape[1], generator=torch.Generator().manual_seed(3)))
    return up @ q, q.T @ down


def _cancelling(up, down):
    """Two columns more, whose huge products cancel each other."""
    a, b = torch.full((len(up), 1), 6e4), torch.full((1, down.shape[1]), 6e4)
    return torch.cat([up, a, -a], 1), torch.cat([down, b, b])


def _one_number(up, down):
    up, down = torch.zeros_like(up), torch.zeros_like(down)
    up[0, 0], down[0, 0] = 1e-3, 1.0
    return up, down


_FACTORS = {
    **{f"up times {f:g}": _each(lambda u, d, f=f: (u * f, d / f)) for f in (2, 1e3, 1e-3, 1e30, -1, 1e-38, 2**0.5)},
    **{f"both times {f:g}": _each(lambda u, d, f=f: (u * f, d * f)) for f in (0, -1, 0.5, 1.5, 10, 1e-20, 1e4)},
    "turned": _each(_turned),
    "other order": _each(lambda u, d: (u.flip(1), d.flip(0))),
    "a column of zeros": _each(lambda u, d: (torch.cat([u, 0 * u[:, :1]], 1), torch.cat([d, d[:1]]))),
    "a column twice": _each(lambda u, d: (torch.cat([u, u[:, :1]], 1), torch.cat([d, d[:1]]))),
    "a column in halves": _each(lambda u, d: (torch.cat([u, u], 1), torch.cat([d, d]) / 2)),
    "huge ones that cancel": _each(_cancelling),
    "one column": _each(lambda u, d: (u[:, :1], d[:1])),
    "one number": _each(_one_number),
    "zero up, largest down": _each(lambda u, d: (0 * u, 0 * d + 65504)),
    "denormal": _each(lambda u, d: (0 * u + 1e-45, d)),
    "minus zero": _each(lambda u, d: (u * -0.0, d)),
    "all negative": _each(lambda u, d: (-u.abs(), d.abs())),
}


def _renamed(change):
    def apply(forger):
        table, tensors = forger.manifest["lora"], forger.tensors[OUTER]
        name = sorted(table)[0]
        new = change(name)
        if new is None:
            del table[name]
            return
        if new not in table:
            table[new] = table.pop(name)
        for end in (".up", ".down"):
            tensors[f"{new}{end}"] = tensors.pop(f"{name}{end}")

    return apply


_NAMES = (
    *(lambda n: f"{n}.up", lambda n: f"{n}.down", lambda n: n.upper(), lambda n: n.replace(".weight", "")),
    *(lambda n: f"../{n}", lambda n: f"{n}\n", lambda n: "", lambda n: n.replace("first.0", "first.1"), lambda n: None),
    *(lambda n: n.replace("first.0", "first.00"), lambda n: n.replace("first", "middle"), lambda n: "x" * 300),
    *(lambda n: "first.0.input_layernorm.weight", lambda n: n.replace("weight", "bias"), lambda n: "lm_head.weight"),
    *(lambda n: n.replace("first.0", "last.0"), lambda n: n.replace("e", "\u0435"), lambda n: f"{n}\x00"),
    *(
        lambda n: "__metadata__",
        lambda n: "up",
        lambda n: ".up",
        lambda n: "lora",
        lambda n: "model.embed_tokens.weight",
    ),
)


def _bare(change):
    """Change every tensor of a whole return, within the limits."""

    def apply(forger):
        tensors, generator = forger.tensors[OUTER], torch.Generator().manual_seed(4)
        for name, tensor in tensors.items():
            tensors[name] = change(tensor, generator).contiguous()

    return apply


def _noise(size, only=None):
    def change(tensor, generator):
        noise = torch.randn(tensor.shape, generator=generator)
        if only is not None:
            kept = torch.zeros_like(noise).view(-1)
            kept[only] = 1
            noise = noise * kept.view(noise.shape)
        return tensor + size * tensor.norm() * noise / max(float(noise.norm()), 1e-12)

    return change


_WHOLE = {
    **{f"noise of {size:g}": _bare(_noise(size)) for size in (1e-6, 0.1, 0.2, 0.24, 0.249, 0.3, 1.0)},
    **{f"all of {size:g} in a number": _bare(_noise(size, 0)) for size in (0.1, 0.24, 0.5)},
    "a sign of zero": _bare(lambda t, g: torch.where(t.abs() < 1e-3, -0.0 * t.abs(), t)),
    "transposed": _bare(lambda t, g: t.T if t.ndim == 2 else t),
    "rolled": _bare(lambda t, g: t.roll(1, -1)),
    "negated": _bare(lambda t, g: -t),
    "vectors alone": _bare(lambda t, g: t * 1.2 if t.ndim == 1 else t),
    "vectors of zeros": _bare(lambda t, g: t * 0 if t.ndim == 1 else t),
    "in float16": lambda forger: _cast(forger, torch.float16),
    "in float64": lambda forger: _cast(forger, torch.float64),
    "in int8": lambda forger: _cast(forger, torch.int8),
    "one missing": lambda forger: forger.tensors[OUTER].popitem(),
    "a name of the emulator": lambda forger: forger.tensors[OUTER].update({"lm_head.weight": torch.ones(2, 2)}),
    "factors beside": lambda forger: forger.tensors[OUTER].update(
        {"first.0.self_attn.q_proj.weight.up": torch.ones(2, 2)}
    ),
    "a table of no ranks": lambda forger: forger.manifest.update(lora={}),
    "a table of ranks": lambda forger: forger.manifest.update(lora={"first.0.self_attn.q_proj.weight": 1}),
}


def _cast(forger, dtype):
    forger.tensors[OUTER] = {name: tensor.to(dtype) for name, tensor in forger.tensors[OUTER].items()}


def returns(sound, generator, whole, thin):
    """(subject, what, files)."""
    tables = (
        (thin, _FACTORS),
        (thin, {f"{change('NAME')!r}": _renamed(change) for change in _NAMES}),
        (whole, _WHOLE),
    )
    for subject, table in tables:
        for what, change in table.items():
            other = Forger(sound / subject, generator)
            change(other)
            yield subject, what, other.files()


# what leaves the update as it is, or nearly so
_NEARLY = {
    "untouched": _bare(lambda t, g: t),
    "one bit of each": _bare(lambda t, g: _flip(t)),
    "a sign of zero": _bare(lambda t, g: t + 0.0),
    **{f"noise of {size:g}": _bare(_noise(size)) for size in (1e-9, 1e-7, 1e-6)},
}
_NEARLY_THIN = {
    **{f"both ways {f:g}": _FACTORS[f"up times {f:g}"] for f in (2, -1, 2**0.5, 1e3)},
    **{what: _FACTORS[what] for what in ("turned", "other order", "a column in halves", "a column of zeros")},
    **{f"times {f:g}": _each(lambda u, d, f=f: (u * f, d)) for f in (1.0, 1 + 1e-6, 1 - 1e-4, 1.01, 1.5, 0.5)},
    "one bit": _each(lambda u, d: (_flip(u), d)),
    "the last bits": _each(lambda u, d: (u * (1 + 1e-7 * torch.sign(u)), d)),
}


def _flip(tensor):
    tensor = tensor.clone()
    tensor.view(torch.int32).view(-1)[0] ^= 1
    return tensor


def votes(sound, generator, whole, thin):
    """A return given twice, the second time with another file: (subject, what, files)."""
    for subject, table in ((whole, _NEARLY), (thin, _NEARLY_THIN)):
        for what, change in table.items():
            other = Forger(sound / subject, generator)
            change(other)
            yield subject, what, other.files()
        data, forger = (sound / subject / OUTER).read_bytes(), Forger(sound / subject, generator)
        names = sorted(forger.tensors[OUTER])
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for what, text in {
            "a header in other words": json.dumps(header, indent=1),
            "a header in another order": json.dumps(dict(sorted(header.items(), reverse=True))),
            "a header with spaces": json.dumps(header) + " " * 64,
        }.items():
            encoded = text.encode()
            yield subject, what, {OUTER: len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]}
        backwards = {name: forger.tensors[OUTER][name] for name in reversed(names)}
        yield subject, "tensors in another order", {OUTER: save(backwards, {"format": "pt"})}
        promise = {**forger.manifest, "privacy": PROMISE}
        yield subject, "a promise", {"manifest.json": dump(promise)}
