"""Noise for a promise, and what steps have spent: Opacus' figures, and bounds that are known otherwise."""

import builtins
import math
from dataclasses import replace
from importlib.metadata import version
from statistics import NormalDist

import pytest
import torch
from opacus.accountants import PRVAccountant
from opacus.accountants.utils import get_noise_multiplier

from siftune.base.errors import RecipeError
from siftune.methods.dp.accounting import Mechanism, calibrated, spent, statement

ASKED = Mechanism(epsilon=8, delta=1e-5, clip=0.1, rows=2400, batch=16, steps=150)
SLACK = 0.02  # the accountant's own error, above and below


def library(noise, rate, steps, delta):
    accountant = PRVAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    return accountant.get_epsilon(delta=delta)


@pytest.mark.parametrize("asked", [ASKED, replace(ASKED, epsilon=1.0, delta=1e-6, rows=500, steps=40)])
def test_noise_and_epsilon_are_the_librarys(asked):
    found = calibrated(asked)
    rate = asked.batch / asked.rows
    assert found.noise == get_noise_multiplier(
        target_epsilon=asked.epsilon, target_delta=asked.delta, sample_rate=rate, steps=asked.steps, accountant="prv"
    )
    assert replace(found, noise=0.0) == asked
    for steps in (1, asked.steps // 2, asked.steps):
        assert spent(found, steps) == library(found.noise, rate, steps, asked.delta)
    assert asked.epsilon - SLACK <= spent(found, asked.steps) <= asked.epsilon


def gaussian_delta(epsilon, noise):
    """δ of one Gaussian mechanism of sensitivity 1, in closed form (Balle and Wang, arXiv 1805.06530)."""
    normal = NormalDist()
    return normal.cdf(0.5 / noise - epsilon * noise) - math.exp(epsilon) * normal.cdf(-0.5 / noise - epsilon * noise)


@pytest.mark.parametrize(("noise", "steps"), [(2.0, 1), (4.0, 10), (3.0, 25)])
def test_with_all_rows_in_every_step_it_is_the_gaussian_mechanism(noise, steps):
    """Composed T times it is one with noise σ / √T."""
    all_rows = replace(ASKED, rows=16, steps=steps, noise=noise, delta=1e-4)
    low, high = 0.0, 50.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(middle, noise / math.sqrt(steps)) <= 1e-4 else (middle, high)
    assert high <= spent(all_rows, steps) <= high + SLACK


def exact_delta(epsilon, noise, rate):
    """δ of one step, by integration over what the step may put out: a row more, and a row less."""
    x = torch.linspace(-40, 40, 2_000_001, dtype=torch.float64)
    without = torch.exp(-(x**2) / 2 / noise**2) / noise / math.sqrt(2 * math.pi)
    other = torch.exp(-((x - 1) ** 2) / 2 / noise**2) / noise / math.sqrt(2 * math.pi)
    with_row = (1 - rate) * without + rate * other
    pairs = ((with_row, without), (without, with_row))
    return max(float((p - math.exp(epsilon) * q).clamp_min(0).sum() * (x[1] - x[0])) for p, q in pairs)


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.01), (0.6, 0.1), (2.0, 0.3)])
def test_one_step_is_bounded_in_both_directions(noise, rate):
    one = replace(ASKED, rows=1000, batch=int(1000 * rate), noise=noise, steps=1)
    bound = spent(one, 1)
    assert exact_delta(bound, noise, rate) <= one.delta
    assert exact_delta(max(0.0, bound - SLACK), noise, rate) > one.delta or bound <= SLACK


def test_steps_that_were_not_done_are_not_counted():
    mechanism = replace(ASKED, noise=0.6)
    assert spent(mechanism, 0) == 0.0
    assert spent(mechanism, 10) < spent(mechanism, 100) < spent(mechanism, 150)


def test_the_statement_says_it_all():
    mechanism = replace(ASKED, noise=0.6)
    assert statement(mechanism, 30) == {
        "epsilon": library(0.6, 16 / 2400, 30, 1e-5),
        "delta": 1e-5,
        "noise_multiplier": 0.6,
        "clip": 0.1,
        "sampling_rate": 16 / 2400,
        "expected_batch": 16,
        "steps": 30,
        "accountant": "opacus PRV",
        "accountant_version": version("opacus"),
        "unit": "one training row, there or not",
    }


def test_a_promise_that_no_noise_keeps_is_refused():
    with pytest.raises(RecipeError, match="dp-epsilon"):
        calibrated(replace(ASKED, epsilon=0.001))


def test_without_opacus_one_sentence_says_what_to_install(monkeypatch):
    def missing(name, *args, **kwargs):
        if name.startswith("opacus"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RecipeError, match="opacus"):
        calibrated(replace(ASKED, epsilon=7.0))
