"""Time and peak memory of training steps, method by method.

Every measurement is a fresh process (`siftune.bench.worker`), so no method inherits memory or warm caches of another.
The methods take turns over several rounds, in an order that rotates, so a slow phase of the machine affects all of
them. Ratios are formed within a round, and medians are taken over the rounds.

Nothing here imports torch: the process that waits for the workers stays small.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from siftune.base.errors import InputError, RecipeError, SiftuneError
from siftune.base.settings import CONFIG, AtLeastTwo, Count, Seed, Settings, Share, Validated, nearest
from siftune.methods import METHODS
from siftune.recipe.schema import Recipe, resolve_recipe

# the ways to draw GAST's support gradient, which differ in cost -> their settings
SUPPORTS: dict[str, dict[str, Any]] = {
    "sample": {"support": "sample"},
    "averaged": {"support": "sample", "support_every": 4},
    "rest": {"support": "rest"},
}
_VARIANTS = (
    "dense-compiled",
    "dense-checkpointing",
    "dense-dp",
    *(f"gast-{support}" for support in SUPPORTS),
    "trl",
    "trl-no-checkpointing",
)
MEASURED = (*(name for name in METHODS if name != "gast"), *_VARIANTS)
"""Names of the methods to measure."""

WORKER = (sys.executable, "-m", "siftune.bench.worker")


@dataclass(config=CONFIG)
class Workload(Validated):
    """The same rows, model and adapter for every method."""

    model: str = "smollm2"
    """Model to train: a folder, a hub id, or smollm2 (packaged, no hub needed)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the frozen weights; auto: the checkpoint's."""
    batch_size: Count = 16
    """Rows in a step."""
    length: AtLeastTwo = 128
    """Tokens in every row."""
    label_share: Share = 0.25
    """Fraction of label tokens, at the end of a row; the other tokens stand for the prompt."""
    rank: Count = 32
    """Rank of the LoRA matrices."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    """Names of the modules that get adapters."""
    active: Share = 0.25
    """rst, ist: fraction of the layers to train in a step."""
    interval: Count = 10
    """ist: optimizer steps between two updates of the importance."""
    steps: Count = 20
    """Timed optimizer steps in a round; use a multiple of interval, so ist's scoring has its usual share."""
    warmup: Count = 2
    """Optimizer steps before the timed ones."""
    seed: Seed = 0
    """Seed of tokens, adapters and draws."""

    def recipe(self, method: str, out: str) -> Recipe:
        """The recipe of one of siftune's own methods on this workload."""
        name, _, variant = method.partition("-")
        shared = ("model", "dtype", "batch_size", "rank", "targets", "seed")
        fields: dict[str, Any] = {field: getattr(self, field) for field in shared}
        fields |= {"train": "random tokens", "max_length": self.length, "steps": self.warmup + self.steps}
        if variant == "compiled":
            fields["compile"] = True
        if variant == "checkpointing":
            fields["checkpointing"] = True
        if variant == "dp":
            fields |= {"dp_epsilon": 8.0, "dp_delta": 1e-6}
        options = {"active": self.active, "interval": self.interval, "select": 0.5}  # select: the papers' fraction
        if name.endswith("gast"):
            options |= SUPPORTS[variant or "rest"]
        for part in METHODS[name].parts:
            own = Settings.names(part.settings)
            fields[part.settings.group] = part.settings(**{key: options[key] for key in options if key in own})
        return resolve_recipe(Recipe(method=name, out=out, **fields))

    def labels(self) -> int:
        """Label tokens in a row."""
        return max(1, round(self.label_share * self.length))


@plain_dataclass(frozen=True)
class Measurement:
    """Result of one process.

    Attributes:
        method: Name of the method.
        round: Number of the round, from 0.
        seconds: Wall time of each timed step, from the end of the previous step to its own end: data, selection
            with its scoring, forward, backward, update and logs.
        peak_memory_mb: Peak memory of the process in 10⁶ bytes: allocated GPU memory, or resident memory if there is
            no GPU.
        facts: dtype, hardware and versions in the process.
    """

    method: str
    round: int
    seconds: tuple[float, ...]
    peak_memory_mb: float
    facts: Mapping[str, Any]

    @property
    def seconds_per_step(self) -> float:
        """Mean over the timed steps, so a rare expensive step has its share."""
        return fmean(self.seconds)


@plain_dataclass(frozen=True)
class Cost:
    """Costs of a method over all rounds.

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


def parse_methods(text: str, names: Sequence[str] = MEASURED) -> list[str]:
    """Split a list with commas into methods, each once.

    Raises:
        RecipeError: A name is unknown, or its package is not installed.
    """
    methods = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not methods:
        raise RecipeError(f"no method to measure; choose from {', '.join(names)}")
    for name in methods:
        if name not in names:
            close = nearest(name, names)
            hint = f"did you mean {close}?" if close else f"choose from {', '.join(names)}"
            raise RecipeError(f"unknown method {name!r}; {hint}")
        if name.startswith("trl") and importlib.util.find_spec("trl") is None:
            raise RecipeError(f"the method {name} needs the package trl: run `pip install 'siftune[trl]'`")
    return methods


def schedule(methods: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Order the measurements as (round, method): every round starts one method later than the previous one."""
    count = len(methods)
    return [(number, methods[(number + place) % count]) for number in range(rounds) for place in range(count)]


def measure(
    method: str, number: int, work: Workload, threads: int | None = None, worker: Sequence[str] | None = None
) -> Measurement:
    """Measure a method in a fresh process.

    Args:
        method: One of `MEASURED`, or a method of `worker`.
        number: Number of the round.
        work: The workload.
        threads: Threads of the process (OMP_NUM_THREADS); None: as in the environment.
        worker: Command of the process, which gets a folder as its last argument; None: `WORKER`.

    Raises:
        InputError: The process refused the workload, or a signal ended it.
        SiftuneError: The process failed otherwise; the message ends with the last line of its log.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with tempfile.TemporaryDirectory(prefix="siftune-bench-") as folder:
        job = {"task": method, "workload": asdict(work)}
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [*(worker or WORKER), folder]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
            return Measurement(method, number, tuple(result.pop("seconds")), result.pop("peak_memory_mb"), result)
    if done.returncode < 0:
        raise InputError(
            f"{signal.Signals(-done.returncode).name} ended the process that measured {method}; if memory ran out, "
            "lower --batch-size or --length"
        )
    last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "it left no message")
    kind = InputError if done.returncode == InputError.exit_code else SiftuneError
    error = kind(f"measuring {method} failed: {last}")
    error.add_note(done.stderr)
    raise error


def summarise(measurements: Sequence[Measurement], compared: Sequence[str]) -> dict[str, Cost]:
    """Reduce measurements to medians, and to medians of ratios within rounds.

    Args:
        measurements: Each method once in every round.
        compared: The methods to form ratios with.

    Returns:
        method -> its cost, in order of first measurement.
    """
    rounds: dict[str, dict[int, Measurement]] = {}
    for measurement in measurements:
        rounds.setdefault(measurement.method, {})[measurement.round] = measurement

    def ratios(method: str, value: Callable[[Measurement], float]) -> dict[str, float]:
        own = rounds[method]
        return {other: median(value(own[n]) / value(rounds[other][n]) for n in own) for other in compared}

    costs = {}
    for method, own in rounds.items():
        seconds = [each.seconds_per_step for each in own.values()]
        costs[method] = Cost(
            seconds_per_step=median(seconds),
            fastest=min(seconds),
            slowest=max(seconds),
            peak_memory_mb=median(each.peak_memory_mb for each in own.values()),
            seconds_ratio=ratios(method, lambda each: each.seconds_per_step),
            memory_ratio=ratios(method, lambda each: each.peak_memory_mb),
        )
    return costs
