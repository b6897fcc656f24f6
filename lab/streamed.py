"""Memory of `siftune emulate` on a base model read layer by layer.

    python -m lab.streamed --folder FOLDER --layers 24 --hidden 2048 --intermediate 5504 --rows 16 --length 64

A random llama in bfloat16 is written to FOLDER/base, if it is not there, in a shard for each layer, and random rows;
then `siftune emulate` runs in a process of its own. Printed are the sizes of the model, of its embeddings and head, and
of a layer; the resident memory that libraries take without any model; and the process's at its peak. Pages of files
are resident too, though the system takes them back when it needs them: the peak without those is printed beside it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

_BARE = "import siftune.offsite.exchange.emulate, siftune.cli.emulate, transformers.models.llama.modeling_llama"
_EMULATE = "import sys; from siftune.cli.main import main; sys.exit(main())"


def main(argv: list[str] | None = None) -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--outer", type=int, default=2, help="layers at either end; only those between are compressed")
    args = parser.parse_args(argv)
    base, rows = args.folder / "base", args.folder / "rows.jsonl"
    if not base.exists():
        from lab.random_llama import save_sharded_llama  # imports torch

        save_sharded_llama(base, args.layers, args.hidden, args.intermediate)
    rows.write_text("".join(json.dumps({"text": _text(args.length, seed)}) + "\n" for seed in range(args.rows)))
    out = args.folder / "kit"
    command = ["-c", _EMULATE, "emulate", "--model", base, "--calibration", rows, "--out", out]
    options = ["--rows", args.rows, "--max-length", args.length, "--template", "none"]
    options += ["--first", args.outer, "--last", args.outer]
    bare, started = peak(["-c", _BARE]), time.monotonic()
    found = peak([*map(str, command), *map(str, options)])
    sizes = {file.name: file.stat().st_size / 1e6 for file in sorted(base.glob("*.safetensors"))}
    rest, layer = list(sizes.values())[:2]
    print("| | MB |\n|---|---:|")
    for name, size in (
        ("model", sum(sizes.values())), ("embeddings and head", rest), ("a layer", layer),
        ("kit's emulator", (out / "emulator.safetensors").stat().st_size / 1e6),
        ("resident, libraries alone", bare[0]), ("resident, peak", found[0]), ("not of files, peak", found[1]),
    ):  # fmt: skip
        print(f"| {name} | {size:,.0f} |")
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return 0


def peak(arguments: list[str]) -> tuple[float, float]:
    """Peak resident memory of a Python process in MB, and its part not backed by files, by polling.

    Raises:
        SystemExit: The process failed.
    """
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    highest = {"VmHWM": 0.0, "RssAnon": 0.0}
    try:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
            except OSError:
                break
            for name, _, rest in (line.partition(":") for line in lines):
                if name in highest:
                    highest[name] = max(highest[name], int(rest.split()[0]) * 1.024 / 1e3)
            time.sleep(0.02)
    except BaseException:
        process.kill()
        raise
    if process.wait():
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return highest["VmHWM"], highest["RssAnon"]


def _text(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("etaoin shrdlu", k=length))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
