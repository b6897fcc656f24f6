"""RST in a plain training loop, on a tiny random model: runs in seconds, downloads nothing."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from siftune import RST, attach_adapter

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4, pad_token_id=0
)
model = attach_adapter(LlamaForCausalLM(config), rank=4)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
ids = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(0))

with RST(active=0.25).attach(model, optimizer=optimizer) as sift:
    for step in range(20):
        layers = sift.last.layers
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.3f}  layers {layers}")
