"""Sound kits of every family, with bases that they are of, and sound returns; for fuzz tests."""

import copy
import dataclasses
import shutil
from pathlib import Path

import torch
from support.keys import make_keys
from support.kits import DEPTH, KINDS, VOCAB, contents
from support.tiny import tiny
from support.tokenizer import CHATML, byte_tokenizer

from siftune.models.families import FAMILIES
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange.returned import write_return
from siftune.offsite.kit.folder import write_kit
from siftune.offsite.kit.manifest import fingerprint
from siftune.offsite.kit.signing import sign

HALF = "half"  # a llama with an emulator in bfloat16
SUBJECTS = (*(kind for kind in FAMILIES if kind != "gemma"), HALF)
RETURN = "llama.return"
WINDOW = {"gpt2": {"max_position_embeddings": 512}, "opt": {"max_position_embeddings": 512}}  # for all rows
THIN = "llama.thin.return"  # of LoRA: factors


def base_of(subject):
    """The base of a subject's kit; the same every time."""
    kind = "llama" if subject in (HALF, "twin", "signed") else subject
    return tiny(KINDS.get(kind, kind), DEPTH, vocab_size=VOCAB, **WINDOW.get(kind, {}))


def write_subject(folder, subject):
    """Write a kit whose outer layers are the base's, and whose middle is small enough to leave finite numbers."""
    base = base_of(subject)
    dtype = torch.bfloat16 if subject == HALF else torch.float32
    parts = contents(base.config.model_type, dtype, **WINDOW.get(subject, {}))
    state = base.state_dict()
    outer = {neutral: state[name].clone() for neutral, name in outer_names(base, parts.split).items()}
    frozen = {name: tensor * 0.1 for name, tensor in parts.frozen.items()}
    return write_kit(
        folder / subject, dataclasses.replace(parts, fingerprint=fingerprint(base), outer=outer, frozen=frozen)
    )


def write_tuned(folder, kit):
    """Write returns that have moved a little: of whole tensors, and of factors."""
    state, generator = base_of("llama").state_dict(), torch.Generator().manual_seed(2)
    names = outer_names(base_of("llama"), kit.manifest.split)
    tensors = {neutral: state[name].clone() for neutral, name in names.items()}
    for tensor in tensors.values():
        tensor += 0.02 * tensor.norm() / tensor.numel() ** 0.5 * torch.randn(tensor.shape, generator=generator)
    write_return(folder / RETURN, tensors, kit)
    factors = {}
    for name, (rows, columns) in ((n, s.shape) for n, s in kit.manifest.outer.items() if len(s.shape) == 2):
        size = 0.1 * (tensors[name].norm() / (2 * rows * columns) ** 0.5) ** 0.5
        factors[f"{name}.up"] = size * torch.randn(rows, 2, generator=generator)
        factors[f"{name}.down"] = size * torch.randn(2, columns, generator=generator)
    write_return(folder / THIN, factors, kit)


def write_twin(folder, name="twin", signing_key=None):
    """Write another kit of the llama base: other numbers, other settings, tokenizer and template."""
    base = base_of("llama")
    config = copy.deepcopy(base.config)
    parts = contents(config.model_type, rms_norm_eps=1e-4)
    state, merges = base.state_dict(), (("e", "r"), ("t", "h"))
    outer = {neutral: 1.01 * state[name] for neutral, name in outer_names(base, parts.split).items()}
    frozen = {name: tensor * 0.11 for name, tensor in parts.frozen.items()}
    tokenizer = byte_tokenizer(CHATML.replace("{{ m.content", "Please: {{ m.content"), merges=merges)
    twin = dataclasses.replace(parts, fingerprint=fingerprint(base), outer=outer, frozen=frozen, tokenizer=tokenizer)
    return write_kit(folder / name, twin, signing_key)


def write_signed(folder):
    """Write keys, and copies of the llama kit and of its twin that are signed with them."""
    for name in ("owner", "foreign"):
        make_keys(folder, name=name)
    for name, source, key in (
        ("signed", "llama", "owner"), ("signed.twin", "twin", "owner"), ("signed.foreign", "llama", "foreign"),
    ):  # fmt: skip
        sign(Path(shutil.copytree(folder / source, folder / name)), folder / f"{key}.pem")


def write_all(folder):
    """Write every sound folder."""
    kits = {subject: write_subject(folder, subject) for subject in SUBJECTS}
    write_tuned(folder, kits["llama"])
    write_twin(folder)
    write_signed(folder)
