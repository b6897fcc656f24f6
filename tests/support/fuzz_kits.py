"""Sound kits of every family, with bases that they are of, and sound returns; for fuzz tests."""

import dataclasses

import torch
from support.kits import DEPTH, KINDS, VOCAB, contents
from support.tiny import tiny

from siftune.models.families import FAMILIES
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange.returned import write_return
from siftune.offsite.kit.folder import write_kit
from siftune.offsite.kit.manifest import fingerprint

HALF = "half"  # a llama with an emulator in bfloat16
SUBJECTS = (*(kind for kind in FAMILIES if kind != "gemma"), HALF)
RETURN = "llama.return"
THIN = "llama.thin.return"  # of LoRA: factors


def base_of(subject):
    """The base of a subject's kit; the same every time."""
    kind = "llama" if subject == HALF else subject
    return tiny(KINDS.get(kind, kind), DEPTH, vocab_size=VOCAB)


def write_subject(folder, subject):
    """Write a kit whose outer layers are the base's, and whose middle is small enough to leave finite numbers."""
    base = base_of(subject)
    parts = contents(base.config.model_type, dtype=torch.bfloat16 if subject == HALF else torch.float32)
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
