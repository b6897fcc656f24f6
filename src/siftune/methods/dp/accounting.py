"""How much noise a promise takes, and what ε the steps that were done have spent: by Opacus' accountant.

Gopi et al., "Numerical Composition of Differential Privacy", NeurIPS 2021, arXiv 2106.02848: the privacy loss of a step
is discretised and composed with itself by Fourier transforms. What is given is an upper bound, which is at most 0.01
above what it bounds. Nothing of Opacus but this is used. It is imported when somebody asks for it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import Any

from siftune.base.errors import RecipeError
from siftune.methods.dp.mechanism import Mechanism

ACCOUNTANT = "opacus PRV"


@cache
def calibrated(mechanism: Mechanism) -> Mechanism:
    """The mechanism with the least noise, up to the search's tolerance, that keeps its ε and δ over its steps.

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
            f"no noise keeps ε = {mechanism.epsilon:g} at δ = {mechanism.delta:g} over {mechanism.steps} steps, as far "
            f"as the accountant can tell ({error}); raise --dp-epsilon or --dp-delta"
        ) from error
    return replace(mechanism, noise=float(noise))


@cache
def spent(mechanism: Mechanism, steps: int) -> float:
    """ε of the steps that were done, at the mechanism's δ; 0 before the first.

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
    """What may be said of a run after so many steps, JSON-ready.

    Returns:
        `epsilon` of these steps, `delta`, `noise_multiplier` σ, `clip` C, `clipping`, `sampling_rate` q,
        `expected_batch` b, `steps`, `accountant`, `accountant_version`, and `unit`, what the promise is about.
    """
    return {
        "epsilon": spent(mechanism, steps),
        "delta": mechanism.delta,
        "noise_multiplier": mechanism.noise,
        "clip": mechanism.clip,
        "clipping": mechanism.clipping,
        "sampling_rate": mechanism.rate,
        "expected_batch": mechanism.batch,
        "steps": steps,
        "accountant": ACCOUNTANT,
        "accountant_version": version("opacus"),
        "unit": "one training row, there or not",
    }


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Opacus' warnings from users: of logarithms of 0 that it means, of a rough bound that only sets a range."""
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
