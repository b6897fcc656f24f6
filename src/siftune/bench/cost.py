"""What the methods cost: time and peak memory of training steps, compared on this machine.

Every measurement is a fresh process (`cost_worker`), so that no method inherits another's memory or warm caches. The
methods take turns over several rounds, in an order that rotates, so that a machine that slows down or is disturbed
for a while does so to all of them. Ratios are formed within a round, and medians are taken over the rounds.

Nothing here imports torch: the process that waits for the workers stays small beside them.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from siftune.base.errors import InputError, RecipeError, SiftuneError
from siftune.base.settings import nearest
from siftune.bench.workload import SUPPORTS, Workload
from siftune.methods import METHODS
from siftune.recipe.checks import check

# method -> what it is
MEASURED = {
    **{name: f"siftune: {method.line}" for name, method in METHODS.items() if name != "gast"},
    "dense-compiled": f"siftune: {METHODS['dense'].line}, by torch.compile",
    **{f"gast-{support}": f"siftune: {METHODS['gast'].line}, support {support}" for support in SUPPORTS},
    "trl": "TRL's SFTTrainer with a PEFT LoRA, TRL's defaults",
    "trl-no-checkpointing": "the same with activation checkpointing off, which TRL turns on by default",
}

WORKER = (sys.executable, "-m", "siftune.bench.worker")


@dataclass(frozen=True)
class Measurement:
    """What one process measured.

    Attributes:
        method: The method.
        round: Number of the round, from 0.
        seconds: Wall time of each timed step, from the end of the step before to its own end: data, selection
            with its scoring, forward, backward, update and logs.
        peak_memory_mb: Peak memory of the process in 10⁶ bytes: allocated on the GPU where there is one, else
            resident.
        facts: dtype, hardware and versions as the process saw them.
    """

    method: str
    round: int
    seconds: tuple[float, ...]
    peak_memory_mb: float
    facts: Mapping[str, Any]

    @property
    def seconds_per_step(self) -> float:
        """Mean over the timed steps, so that a rare expensive step counts for its share."""
        return fmean(self.seconds)


@dataclass(frozen=True)
class Cost:
    """A method over all rounds.

    Attributes:
        seconds_per_step: Median over the rounds.
        fastest: Lowest round.
        slowest: Highest round.
        peak_memory_mb: Median over the rounds.
        seconds_ratio: reference -> median over the rounds of this method's seconds over the reference's.
        memory_ratio: The same for memory.
    """

    seconds_per_step: float
    fastest: float
    slowest: float
    peak_memory_mb: float
    seconds_ratio: dict[str, float]
    memory_ratio: dict[str, float]


def parse_methods(text: str) -> list[str]:
    """Split names with commas between them; a name given twice counts once.

    Raises:
        RecipeError: A name is unknown, or its package is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise RecipeError(f"no method to measure: name some of {', '.join(MEASURED)}")
    for name in names:
        if name not in MEASURED:
            close = nearest(name, MEASURED)
            guess = f"did you mean {close}?" if close else f"known: {', '.join(MEASURED)}"
            raise RecipeError(f"unknown method {name!r}; {guess}")
        if name.startswith("trl") and importlib.util.find_spec("trl") is None:
            raise RecipeError(f"the method {name} needs the package trl: run `pip install 'siftune[trl]'`")
    return names


def check_workload(work: Workload) -> None:
    """Refuse a workload that no recipe can have.

    Raises:
        RecipeError: With one sentence on the first value that cannot be used.
    """
    check(work.recipe("ist", "unused"))


def schedule(methods: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Order the measurements as (round, method): every round starts one method later than the one before."""
    count = len(methods)
    return [(number, methods[(number + place) % count]) for number in range(rounds) for place in range(count)]


def measure(
    method: str, number: int, work: Workload, threads: int | None = None, worker: Sequence[str] | None = None
) -> Measurement:
    """Measure a method in a fresh process.

    Args:
        method: One of `MEASURED`.
        number: The round, for the record.
        work: What is trained.
        threads: Threads of the process (OMP_NUM_THREADS); as in this process's environment if None.
        worker: Command of the process, to which a folder is added; `cost_worker` if None.

    Raises:
        InputError: The process refused the workload, or was killed.
        SiftuneError: It failed in another way; its last words are in the message.
    """
    result = run_worker(method, work, threads, worker)
    return Measurement(method, number, tuple(result.pop("seconds")), result.pop("peak_memory_mb"), result)


def run_worker(
    task: str, work: Workload, threads: int | None = None, worker: Sequence[str] | None = None
) -> dict[str, Any]:
    """Have a fresh process measure a method, and return what it measured; raises as `measure`."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with tempfile.TemporaryDirectory(prefix="siftune-bench-") as folder:
        Path(folder, "job.json").write_text(json.dumps({"task": task, "workload": asdict(work)}), encoding="utf-8")
        done = subprocess.run(
            [*(worker or WORKER), folder], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise _failure(task, done.returncode, done.stderr)
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    return result


def _failure(task: str, code: int, log: str) -> SiftuneError:
    """Put the end of a worker into one sentence."""
    if code < 0:
        return InputError(
            f"the process that measured {task} was killed by {signal.Signals(-code).name}; where memory ran out, "
            "lower --batch-size or --length"
        )
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it left no message")
    kind = InputError if code == InputError.exit_code else SiftuneError
    error = kind(f"measuring {task} failed: {last}")
    error.add_note(log)  # all of it, for who looks at the traceback
    return error


def references(methods: Sequence[str], against: str | None = None) -> list[str]:
    """What the others are compared with: dense, or else the first method; and `against`."""
    first = "dense" if "dense" in methods else methods[0]
    return list(dict.fromkeys([first, against or first]))


def summarise(measurements: Sequence[Measurement], compared: Sequence[str]) -> dict[str, Cost]:
    """Reduce measurements to medians and to medians of ratios within rounds.

    Args:
        measurements: Each method once in every round.
        compared: The methods that ratios are formed with.

    Returns:
        method -> its cost, in order of first measurement.
    """
    seconds = _by_method({(m.method, m.round): m.seconds_per_step for m in measurements})
    memory = _by_method({(m.method, m.round): m.peak_memory_mb for m in measurements})
    return {
        method: Cost(
            seconds_per_step=median(rounds.values()),
            fastest=min(rounds.values()),
            slowest=max(rounds.values()),
            peak_memory_mb=median(memory[method].values()),
            seconds_ratio={other: _median_ratio(rounds, seconds[other]) for other in compared},
            memory_ratio={other: _median_ratio(memory[method], memory[other]) for other in compared},
        )
        for method, rounds in seconds.items()
    }


def _by_method(values: Mapping[tuple[str, int], float]) -> dict[str, dict[int, float]]:
    table: dict[str, dict[int, float]] = {}
    for (method, number), value in values.items():
        table.setdefault(method, {})[number] = value
    return table


def _median_ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    return median(value / theirs[number] for number, value in ours.items())
