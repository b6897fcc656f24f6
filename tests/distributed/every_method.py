"""One rank of runs with every method, one after the other; saves what each ended with."""

import os
import sys
from pathlib import Path

import torch
from support.every_method import NAMES, trained
from support.trainers import leave

if __name__ == "__main__":
    out, results = Path(sys.argv[1]), {}
    for name in NAMES:
        results[name], trainer = trained(out, name)
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")
    leave(trainer)
