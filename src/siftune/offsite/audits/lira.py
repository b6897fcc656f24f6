"""LiRA: membership inference with shadow models.

Carlini et al., "Membership inference attacks from first principles", IEEE S&P 2022, arXiv 2112.03570. The attacker
tunes N models as the data owner would, each on half of all candidate rows, drawn at random. A row's confidence under a
model, scaled so that it is nearly normal over models,

    φ = ln(p / (1 − p)),    p = exp(−nll), nll the mean over the row's label tokens

has one distribution over the models that were tuned on the row and another over those that were not. φ* being the row's
confidence under the model in question,

    score = ln 𝒩(φ*; μ_in, σ_in²) − ln 𝒩(φ*; μ_out, σ_out²)

This is the paper's online attack, by an attacker who can tune on the candidates themselves.

Ours: σ_in and σ_out are one each for all rows, whatever N: the paper's choice for fewer than 64 shadows. Models come in
pairs, tuned on complementary halves, so that no row has only models of one side. A model's half is drawn among
the candidates alone, members and others; it passes over its rows as often as `AuditSettings.steps` pass over the
model's.

Symbols: φ of the shadows `shadows_NR`, whether tuned on the row `trained_NR`, φ* `target_R`.
Shapes: N shadow models, R candidate rows.
"""

import numpy as np
from numpy.typing import NDArray

from siftune.evaluate.bootstrap import Floats

Flags = NDArray[np.bool_]

_LEAST = 1e-12  # nats: a row whose every token is certain has no finite φ


def confidence(nll: Floats) -> Floats:
    """φ of mean negative log-likelihoods per token, elementwise."""
    nll = np.maximum(np.asarray(nll, dtype=np.float64), _LEAST)
    return np.asarray(-nll - np.log(-np.expm1(-nll)))


def halves(count: int, rows: int, seed: int) -> Flags:
    """Training rows of each of N ≥ 2 shadow models: half of the R ≥ 2, and the next model the others.

    Returns:
        (N, R). With an odd number of rows one model of a pair has one row more.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros((count, rows), dtype=bool)
    for first in range(0, count, 2):
        drawn[first, rng.permutation(rows)[: rows // 2]] = True
        if first + 1 < count:
            drawn[first + 1] = ~drawn[first]
    return drawn


def lira(target_R: Floats, shadows_NR: Floats, trained_NR: Flags) -> Floats:
    """Score candidate rows.

    Returns:
        (R,); the higher the likelier a member.

    Raises:
        ValueError: A row has no shadow model that was tuned on it, or none that was not.
    """
    if not trained_NR.any(axis=0).all() or trained_NR.all(axis=0).any():
        raise ValueError("every row needs a shadow model that was tuned on it and one that was not")
    mean_in, sigma_in = _normal(shadows_NR, trained_NR)
    mean_out, sigma_out = _normal(shadows_NR, ~trained_NR)
    inside = -0.5 * ((target_R - mean_in) / sigma_in) ** 2 - np.log(sigma_in)
    outside = -0.5 * ((target_R - mean_out) / sigma_out) ** 2 - np.log(sigma_out)
    scores_R: Floats = inside - outside
    return scores_R


def _normal(shadows_NR: Floats, counted_NR: Flags) -> tuple[Floats, float]:
    """Mean of every row over the models that count, and one deviation for all rows."""
    counts_R = counted_NR.sum(axis=0)
    mean_R = (shadows_NR * counted_NR).sum(axis=0) / counts_R
    squares = (((shadows_NR - mean_R) * counted_NR) ** 2).sum()
    freedom = int((counts_R - 1).sum())
    # One model per row and kind leaves no deviation: then only the means count.
    return mean_R, max(float(np.sqrt(squares / freedom)), _LEAST) if freedom else 1.0
