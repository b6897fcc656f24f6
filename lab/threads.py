"""Cost of waiting threads: matrix products on two threads, on an idle machine and beside other work.

    python -m lab.threads --rounds 3 --seconds 5

Each figure is of a fresh process, and settings take turns: GNU's OpenMP by default, as siftune sets it
(`siftune.base.environment`), and with threads that sleep at once. The other work is processes that compute without end.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

from siftune.base.environment import settle_threads

SETTINGS = ("plain", "siftune", "passive")
_PRODUCTS = """
import sys, time, torch
x, w, v = (torch.randn(*s, dtype=torch.bfloat16) for s in ((400, 576), (576, 1536), (1536, 576)))
begin, count = time.perf_counter(), 0
while time.perf_counter() - begin < float(sys.argv[1]):
    torch.nn.functional.silu(x @ w) @ v
    count += 1
print(count / (time.perf_counter() - begin))
"""
_WORK = "while True: sum(range(10**6))"


def environment(setting: str, threads: int) -> dict[str, str]:
    """Variables of a process with a setting."""
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    variables = {name: value for name, value in os.environ.items() if name not in own}
    variables["OMP_NUM_THREADS"] = str(threads)
    if setting == "siftune":
        settle_threads(variables)
    if setting == "passive":
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
    return variables


def products(setting: str, threads: int, seconds: float) -> float:
    """Pairs of products a second, in a process of its own."""
    command = [sys.executable, "-c", _PRODUCTS, str(seconds)]
    done = subprocess.run(command, env=environment(setting, threads), capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(others: int, rounds: int, threads: int, seconds: float) -> dict[str, list[float]]:
    """Products a second by setting, beside N processes of other work."""
    busy = [subprocess.Popen([sys.executable, "-c", _WORK]) for _ in range(others)]
    try:
        time.sleep(1)
        found: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        for _ in range(rounds):
            for setting in SETTINGS:
                found[setting].append(products(setting, threads, seconds))
        return found
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 2, 6], help="processes of other work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args(argv)
    print("| beside | setting | products/s, median | range | × plain |\n|---|---|---|---|---|")
    for others in args.others:
        found = measure(others, args.rounds, args.threads, args.seconds)
        for setting, values in found.items():
            ratio = median(values) / median(found["plain"])
            spread = f"{min(values):.0f}–{max(values):.0f}"
            print(f"| {others} processes | {setting} | {median(values):.0f} | {spread} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
