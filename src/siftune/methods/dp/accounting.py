"""The mechanism, its noise for (ε, δ), and ε of the steps so far, by Opacus' accountant.

Gopi et al., "Numerical Composition of Differential Privacy", NeurIPS 2021, arXiv 2106.02848: the privacy loss of a step
is discretised and composed with itself by Fourier transforms. The result is an upper bound, about 0.01 above the true
value and at most 0.02. Only the accountant of Opacus is used, and it is imported on first use.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

from siftune.base.errors import RecipeError

ACCOUNTANT = "opacus PRV"


@dataclass(frozen=True)
class Mechanism:
    """A subsampled Gaussian mechanism, composed over steps."""

    epsilon: float  # upper bound on ε of the complete run
    delta: float
    clip: float  # C, the largest norm of a row's contribution to a step
    rows: int  # n, training rows
    batch: int  # b, expected rows per step
    steps: int  # optimizer steps of the complete run
    noise: float = 0.0  # σ, the standard deviation of the noise in units of C; 0 before calibration

    @property
    def rate(self) -> float:
        """Probability q that a row is drawn for a step."""
        return self.batch / self.rows


@cache
def calibrated(mechanism: Mechanism) -> Mechanism:
    """The mechanism with the least noise, up to the search's tolerance, that satisfies its ε and δ over its steps.

    Raises:
        RecipeError: Opacus is not installed, or no noise is large enough.
    """
    search = _accountants("utils").get_noise_multiplier
    try:
        with _without_warnings():
            noise = search(
                target_epsilon=mechanism.epsilon,
                target_delta=mechanism.delta,
                sample_rate=mechanism.rate,
                steps=mechanism.steps,
                accountant="prv",
            )
    except ValueError as error:
        raise RecipeError(
            f"no noise satisfies ε = {mechanism.epsilon:g} at δ = {mechanism.delta:g} over {mechanism.steps} steps, by "
            f"the accountant ({error}); raise --dp-epsilon or --dp-delta"
        ) from error
    return replace(mechanism, noise=float(noise))


@cache
def spent(mechanism: Mechanism, steps: int) -> float:
    """ε of the steps so far, at the mechanism's δ; 0 before the first.

    Raises:
        RecipeError: Opacus is not installed.
    """
    if not steps:
        return 0.0
    accountant = _accountants("prv").PRVAccountant()
    accountant.history = [(mechanism.noise, mechanism.rate, steps)]
    with _without_warnings():
        return float(accountant.get_epsilon(delta=mechanism.delta))


def statement(mechanism: Mechanism, steps: int) -> dict[str, Any]:
    """JSON-ready privacy statement on a run after some steps.

    Returns:
        `epsilon` of these steps, `delta`, `noise_multiplier` σ, `clip` C, `sampling_rate` q,
        `expected_batch` b, `steps`, `accountant`, `accountant_version`, and `unit`, the unit of privacy.
    """
    return {
        "epsilon": spent(mechanism, steps),
        "delta": mechanism.delta,
        "noise_multiplier": mechanism.noise,
        "clip": mechanism.clip,
        "sampling_rate": mechanism.rate,
        "expected_batch": mechanism.batch,
        "steps": steps,
        "accountant": ACCOUNTANT,
        "accountant_version": version("opacus"),
        "unit": "one training row, there or not",
    }


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress Opacus' warnings on intended logarithms of 0, and on a rough bound that only sets a range."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _accountants(name: str) -> Any:
    try:
        from opacus.accountants import prv, utils
    except ImportError as error:
        raise RecipeError(
            "differential privacy needs the package opacus, for its accounting; install it with: pip install "
            "'siftune[dp]'"
        ) from error
    return {"prv": prv, "utils": utils}[name]
