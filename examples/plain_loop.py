"""IST and GAST in a plain PyTorch loop: python examples/plain_loop.py [MODEL [STEPS]].

MODEL is a folder or hub id; without one a tiny random model is trained, which takes seconds and downloads nothing.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from siftune import GAST, IST, attach_adapter


def load() -> torch.nn.Module:
    """The model that was named, or a tiny one."""
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1])
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
model = attach_adapter(load(), rank=4)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
ids = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(0))
batch = {"input_ids": ids, "labels": ids}

with (
    IST(active=0.5, interval=5).attach(model, batches=[batch], optimizer=optimizer) as layers,
    GAST(select=6, support="rest").attach(model, optimizer=optimizer) as rows,
):
    for step in range(steps):
        trained = layers.last.layers
        loss = model(**batch).loss
        loss.backward()
        followed = dict(zip(rows.last.layers, rows.last.selected.tolist(), strict=True))
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.3f}  layers {trained}  the lowest followed {followed[trained[0]]}")
print("importance:", [float(f"{value:.3g}") for value in layers.importance.tolist()])
