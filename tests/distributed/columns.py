"""One rank of exchanges: of columns, of which rank 0 has one, rank 1 three; of none; and of three flags."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed

from siftune.base.ranks import columns_of_ranks
from siftune.train.guards.flags import Flag, exchange

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank, cpu = int(os.environ["RANK"]), torch.device("cpu")
    columns = torch.arange(4.0, dtype=torch.float64)[1:] if rank else torch.zeros(1, dtype=torch.float64)
    assert columns_of_ranks(torch.zeros(2, 0, dtype=torch.float64), cpu).shape == (2, 0)
    found = columns_of_ranks(torch.stack([columns, columns + 10]), cpu)
    flags = [Flag(lambda: rank == 0), Flag(lambda: rank == 1), Flag(lambda: False)]
    assert not any(flags)
    reduced, reduce = [], distributed.all_reduce
    distributed.all_reduce = lambda tensor: (reduced.append(tensor), reduce(tensor))
    exchange(flags, cpu)
    assert [bool(flag) for flag in flags] == [True, True, False]
    assert len(reduced) == 1
    torch.save(found, Path(sys.argv[1]) / f"rank{rank}.pt")
    distributed.destroy_process_group()
