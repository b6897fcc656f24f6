"""What the tests of the audit share: a base model, emulators of it, rows, and the slow way to score them."""

import copy
import gc
from dataclasses import replace

import numpy as np
import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from siftune.data.rows import rows_from
from siftune.offsite.audits.members import tokenize_audit
from siftune.offsite.audits.models import OffsiteModels
from siftune.offsite.audits.settings import AuditSettings
from siftune.offsite.emulator.model import LayerShape, Split, build, emulator_config

SPLIT = Split(1, 1)
TOKENIZER = byte_tokenizer()
SETTINGS = AuditSettings(
    steps=6,
    lr=3e-3,
    batch_size=4,
    max_length=48,
    template="none",
    recovery_lrs=(1e-3,),
    eval_batch_size=20,
    resamples=300,
)
QUICK = replace(SETTINGS, steps=3, recovery=False, membership=False, resamples=50)

# the Trainer collects garbage whenever it ends, which takes long beside tiny models: what is there now needs no look
gc.collect()
gc.freeze()


def records(start, stop, choices=True):
    found = [{"prompt": f"{i} and {i}?", "completion": str(2 * i)} for i in range(start, stop)]
    return [{**row, **({"choices": [row["completion"], "no", "-1"]} if choices else {})} for row in found]


def base():
    """Five layers, in training mode, with flags of its own."""
    model = tiny("llama", 5, vocab_size=300, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for p in model.parameters():
            p.data += 0.02 * torch.randn(p.shape)  # no norm's weight is 1 then, nor all of one value
    model.model.embed_tokens.requires_grad_(False)
    return model


def shorter(model):
    """An emulator of it without its third layer."""
    other = copy.deepcopy(model)
    del other.model.layers[2]
    other.config.num_hidden_layers = 4
    for number, layer in enumerate(other.model.layers):
        layer.self_attn.layer_idx = number
    return other


def whole(model):
    """An emulator of which nothing is compressed."""
    shapes = [LayerShape(number) for number in (1, 2, 3)]
    other = build(emulator_config(model.config, SPLIT, shapes), SPLIT, shapes, meta=False)
    other.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    return other


def models(emulator=shorter):
    model = base()
    return OffsiteModels(model, emulator(model), SPLIT, TOKENIZER)


def rows(choices=True):
    parts = records(0, 20, choices), records(100, 108, choices)
    made = tokenize_audit(*map(rows_from, parts), TOKENIZER, SETTINGS)
    return made if choices else replace(made, questions=None)


def snapshot(model):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad, p.dtype) for p in model.parameters()], [m.training for m in model.modules()]
    return state, flags


def same(model, before):
    state, flags = before
    now, now_flags = snapshot(model)
    return now_flags == flags and now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in now)


def losses(model, data):
    """Sum per row over label tokens, row by row."""
    found = []
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        found.append(loss * sum(label != -100 for label in labels[1:]))
    return np.array(found)
