"""One rank of a training run; saves what it ended with."""

import json
import sys
from pathlib import Path

import torch
from support.trainers import adapted, leave, rows, train, weights

from siftune import GAST, IST, Keep


def layer_method(settings):
    """IST with what it chose."""
    method = IST(active=0.5, **settings)
    chosen = []
    method.on_select = chosen.append
    return method, chosen


if __name__ == "__main__":
    out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    samples = settings.pop("gast", None)
    ist = settings.pop("ist", {"interval": 2, "score_batch_size": 6})
    with_ist = settings.pop("with_ist", samples is None)
    keep = settings.pop("keep", None)
    methods, chosen = [], []
    if with_ist:
        method, chosen = layer_method(ist)
        methods.append(method)
    if samples is not None:
        given = rows(9, seed=4) if samples["support"] == "dataset" else None
        methods.append(GAST(keep=True, support_set=given, **samples))
    keeps = [] if keep is None else [Keep([rows(1, seed=5)[0]] * 6, **keep)]
    model, trainer = train(out, *methods, *keeps, model=adapted(), dataset=rows(48) if samples else None, **settings)
    torch.save(
        {
            "weights": weights(model),
            "layers": [c.layers for c in chosen],
            "importance": methods[0].importance if with_ist else None,
            "samples": [vars(s) for s in methods[-1].history] if samples is not None else [],
            "find_unused": getattr(trainer.model_wrapped, "find_unused_parameters", None),
        },
        out / f"rank{trainer.args.process_index}.pt",
    )
    leave(trainer)
