"""One rank of a training run; saves what it ended with."""

import json
import sys
from pathlib import Path

import torch
from trainers import adapted, train, weights

from siftune import IST

if __name__ == "__main__":
    out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    method = IST(active=0.5, interval=2, score_batch_size=6)
    chosen = []
    method.on_select = chosen.append
    model, trainer = train(out, method, model=adapted(), **settings)
    torch.save(
        {
            "weights": weights(model),
            "layers": [c.layers for c in chosen],
            "importance": method.importance,
            "find_unused": getattr(trainer.model_wrapped, "find_unused_parameters", None),
        },
        out / f"rank{trainer.args.process_index}.pt",
    )
