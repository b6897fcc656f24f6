"""One rank of an exchange of columns: rank 0 brings one, rank 1 three; and once neither brings any."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed

from siftune.engine.ranks import columns_of_ranks

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank, cpu = int(os.environ["RANK"]), torch.device("cpu")
    columns = torch.arange(4.0, dtype=torch.float64)[1:] if rank else torch.zeros(1, dtype=torch.float64)
    assert columns_of_ranks(torch.zeros(2, 0, dtype=torch.float64), cpu).shape == (2, 0)
    found = columns_of_ranks(torch.stack([columns, columns + 10]), cpu)
    torch.save(found, Path(sys.argv[1]) / f"rank{rank}.pt")
    distributed.destroy_process_group()
