"""One rank of a run that records its rows."""

import os
import sys
from pathlib import Path

import torch
from support.recorded import recorded

if __name__ == "__main__":
    out = Path(sys.argv[1])
    numbers, trainer = recorded(out, 2)
    torch.save(numbers, out / f"rank{os.environ['RANK']}.pt")
    trainer.accelerator.end_training()  # else gloo's threads may still run when the process ends, which aborts it
