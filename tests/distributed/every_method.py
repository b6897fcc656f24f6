"""One rank of runs with methods: each under DDP, with a sharded base, and gone on with from a checkpoint of one rank.

Saves what each ended with, by method, by the name of the settings, and by how it was run.
"""

import json
import os
import sys
from pathlib import Path

import torch
from support.every_method import SETTINGS, trained
from support.trainers import leave

HOW = {"ddp": {}, "fsdp": {"shard": True}, "resumed": {"shard": True}}

if __name__ == "__main__":
    out, results = Path(sys.argv[1]), {}
    for name, kind, way, checkpoint in json.loads(sys.argv[2])["runs"]:
        given = {**HOW[way], **SETTINGS[kind], "resume": checkpoint}
        results[name, kind, way], trainer = trained(out / name / kind / way, name, **given)
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")
    leave(trainer)
