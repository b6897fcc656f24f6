"""What siftune weighs: packages that `pip install siftune` brings, and how long imports take.

    python -m lab.weight

Sizes are of the installed files of each distribution in this environment, and of all that it requires; times are the
processor's, of fresh processes, the least of three.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

COMMAND_LINE = ("datasets", "gguf", "rich")  # what the callbacks do without
IMPORTS = {
    "python itself": "pass",
    "import siftune": "import siftune",
    "siftune --help": "from siftune.cli.main import main; main(['--help'])",
    "import torch, transformers, peft": "import torch, peft; from transformers import Trainer",
    "from siftune import GAST, IST, LabelLogits": "from siftune import GAST, IST, LabelLogits",
}
ROUNDS = 3


def requirements(name: str) -> list[str]:
    """Names of the distributions that one requires, extras aside; of those alone that are installed here."""
    lines = distribution(name).requires or []
    names = [re.split(r"[\s;<>=!~\[(]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]
    return [other for other in names if is_installed(other)]


def is_installed(name: str) -> bool:
    """Whether a distribution is in this environment."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def closure(names: list[str]) -> set[str]:
    """Some distributions and all that they require."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            waiting += requirements(name)
    return found


def megabytes(names: set[str]) -> float:
    """Size of the distributions' installed files, in 10⁶ bytes."""
    files = [file for name in names for file in distribution(name).files or []]
    return sum(file.size or 0 for file in files) / 1e6


def seconds(code: str) -> float:
    """Processor time of a fresh process that runs some code, the least of some."""
    times = []
    for _ in range(ROUNDS):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(times)


def main() -> None:
    """Print both tables."""
    everything = closure(["siftune"])
    own = requirements("siftune")
    without = closure([name for name in own if name not in COMMAND_LINE]) | {"siftune"}
    print(f"all of it: {len(everything)} packages, {megabytes(everything):,.0f} MB")
    print(f"  of which torch alone: {megabytes({'torch'}):,.0f} MB")
    print(f"without the command line's own: {len(without)} packages, {megabytes(without):,.0f} MB")
    for name in COMMAND_LINE:
        alone = everything - (closure([other for other in own if other != name]) | {"siftune"})
        print(f"  {name}: {megabytes(alone):,.0f} MB with {len(alone) - 1} that nothing else requires")
    for words, code in IMPORTS.items():
        print(f"{words}: {seconds(code):.2f} s")


if __name__ == "__main__":
    main()
