"""Components, their scores and the factors against dense changes of the matrix, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.curvature import curvature
from torch.testing import assert_close

from siftune.offsite.maths.drd import (
    canonical,
    component_scores,
    components,
    factor,
    joint_costs,
    keep_components,
    rank_of,
)
from siftune.offsite.maths.kfac import DAMPING, apply

BASES = ("svd", "whitened")


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed, count, inputs, outputs):
    """Inputs and output gradients, with directions that count more than others."""
    return (
        drawn(seed, count, inputs) @ drawn(seed + 1, inputs, inputs),
        drawn(seed + 2, count, outputs) @ drawn(seed + 3, outputs, outputs),
    )


@st.composite
def cases(draw):
    """A matrix and tokens: tall and wide, fewer tokens than features and more."""
    inputs, outputs, count = draw(st.integers(2, 6)), draw(st.integers(2, 6)), draw(st.integers(3, 9))
    seed = draw(st.integers(0, 999))
    return drawn(seed + 9, outputs, inputs), *tokens(seed, count, inputs, outputs)


def damped(rows_NF):
    moment = rows_NF.T @ rows_NF / len(rows_NF)
    return moment + DAMPING * moment.trace() / len(moment) * torch.eye(len(moment)).double()


def cost(delta_OI, x_NI, g_NO):
    """⟨δ, H δ⟩ of the damped curvature."""
    return (delta_OI * (damped(g_NO) @ delta_OI @ damped(x_NI))).sum().item()


def gcs_of(changes, x_NI, g_NO, lam):
    """The score of every change, each formed densely: H from the Kronecker product, D token by token."""
    hessian = torch.kron(g_NO.T @ g_NO / len(g_NO), x_NI.T @ x_NI / len(x_NI))
    slope_OI = sum(torch.outer(g, x) for g, x in zip(g_NO, x_NI, strict=True))
    shifts = [(hessian @ delta.flatten()).abs().sum().item() for delta in changes]
    rises = [(slope_OI * delta).sum().item() for delta in changes]
    mean_shift, mean_rise = (sum(map(abs, term)) / len(changes) for term in (shifts, rises))
    pairs = zip(shifts, rises, strict=True)
    return torch.tensor([s / mean_shift - lam * r / mean_rise for s, r in pairs], dtype=torch.float64)


def pieces(parts):
    return [torch.outer(left, right) for left, right in zip(parts.left_OK.T, parts.right_KI, strict=True)]


@given(keep=st.floats(0.01, 1), outputs=st.integers(1, 99), inputs=st.integers(1, 99))
def test_rank(keep, outputs, inputs):
    rank, budget = rank_of(keep, outputs, inputs), keep * outputs * inputs
    assert rank >= 1
    assert rank == 1 or rank * (outputs + inputs) <= budget + 1e-6
    assert (rank + 1) * (outputs + inputs) > budget


@pytest.mark.parametrize(
    ("keep", "outputs", "inputs", "rank"),
    [(0.7, 576, 576, 201), (0.7, 192, 576, 100), (1.0, 4, 4, 2), (0.001, 9, 9, 1), (0.57, 200, 200, 57)],
)
def test_ranks(keep, outputs, inputs, rank):
    assert rank_of(keep, outputs, inputs) == rank


@pytest.mark.parametrize("basis", BASES)
@given(case=cases())
def test_components_sum_to_the_matrix(basis, case):
    weight_OI, x_NI, g_NO = case
    parts = components(weight_OI, curvature(x_NI, g_NO), basis)
    assert parts.size_K.shape == (min(weight_OI.shape),)
    assert torch.equal(parts.size_K, parts.size_K.sort(descending=True).values)
    assert_close(sum(pieces(parts)), weight_OI, rtol=1e-6, atol=1e-6)


@given(case=cases())
def test_svd_components(case):
    weight_OI, x_NI, g_NO = case
    parts = components(weight_OI, curvature(x_NI, g_NO), "svd")
    assert_close(parts.size_K, torch.linalg.svdvals(weight_OI))
    assert_close(parts.left_OK.norm(dim=0), torch.ones_like(parts.size_K))
    assert_close(parts.right_KI.norm(dim=1), parts.size_K)


@given(case=cases())
def test_whitened_components_are_orthogonal_under_the_curvature(case):
    weight_OI, x_NI, g_NO = case
    parts = components(weight_OI, curvature(x_NI, g_NO), "whitened")
    dense = pieces(parts)
    products = [[(a * (damped(g_NO) @ b @ damped(x_NI))).sum() for b in dense] for a in dense]
    scale = float(parts.size_K[0]) ** 2
    assert_close(torch.tensor(products) / scale, parts.size_K.square().diag() / scale, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("basis", BASES)
@given(case=cases(), lam=st.sampled_from([0.0, 0.3, 4.0]))
def test_scores_of_every_component(basis, case, lam):
    weight_OI, x_NI, g_NO = case
    known = curvature(x_NI, g_NO)
    parts = components(weight_OI, known, basis)
    expected = gcs_of([-piece for piece in pieces(parts)], x_NI, g_NO, lam)
    assert_close(component_scores(parts, known, lam), expected, rtol=1e-6, atol=1e-6)


def test_without_curvature_scores_are_zero():
    known = curvature(torch.zeros(5, 4), torch.zeros(5, 3))
    for basis in BASES:
        parts = components(torch.ones(3, 4), known, basis)
        assert torch.equal(component_scores(parts, known, 1.0), torch.zeros(3))
        assert_close(parts.left_OK @ parts.right_KI, torch.ones(3, 4))


@given(
    scores=st.lists(st.integers(-9, 9), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    data=st.data(),
    protect=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_keep_components(scores, seed, data, protect):
    count = len(scores)
    rank = data.draw(st.integers(1, count))
    sizes = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).double()
    safe = sorted(range(count), key=lambda k: -sizes[k])[: min(rank, math.ceil(protect * count - 1e-9))]
    others = sorted((k for k in range(count) if k not in safe), key=lambda k: -scores[k])
    got = keep_components(torch.tensor(scores).double(), sizes, rank, protect)
    assert got.dtype == torch.int64
    assert got.tolist() == sorted([*safe, *others[: rank - len(safe)]])


def test_the_largest_twentieth_stays():
    sizes = torch.arange(100, 0, -1.0)
    assert keep_components(-sizes, sizes, 7).tolist() == [0, 1, 2, 3, 4, 98, 99]
    assert keep_components(-sizes, sizes, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_largest_whitened_components_are_the_best_approximation(rank):
    weight_OI, (x_NI, g_NO) = drawn(50, 6, 7), tokens(0, 20, 7, 6)
    known = curvature(x_NI, g_NO)
    parts = components(weight_OI, known, "whitened")
    best = parts.left_OK[:, :rank], parts.right_KI[:rank]
    least = cost(best[0] @ best[1] - weight_OI, x_NI, g_NO)
    assert_close(least, parts.size_K[rank:].square().sum().item(), rtol=1e-9, atol=0)
    dense = pieces(parts)
    others = [sum(dense[k] for k in kept) for kept in itertools.combinations(range(6), rank)][1:]
    plain = components(weight_OI, known, "svd")
    others.append(plain.left_OK[:, :rank] @ plain.right_KI[:rank])
    for seed, size in itertools.product(range(100), (1e-3, 0.1, 1.0)):
        up, down = (half + size * half.std() * drawn(seed, *half.shape) for half in best)
        others.append(up @ down)
    assert all(cost(other - weight_OI, x_NI, g_NO) > least for other in others)


@given(case=cases(), seed=st.integers(0, 99), data=st.data())
def test_canonical_factors_tell_only_their_product(case, seed, data):
    outputs, inputs = case[0].shape
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    up_OR, down_RI = drawn(seed, outputs, rank), drawn(seed + 1, rank, inputs)
    got_up, got_down = canonical(up_OR, down_RI)
    assert got_up.shape == up_OR.shape
    assert got_down.shape == down_RI.shape
    assert_close(got_up @ got_down, up_OR @ down_RI)
    sizes = torch.linalg.svdvals(up_OR @ down_RI)[:rank].diag()
    assert_close(got_up.T @ got_up, sizes)
    assert_close(got_down @ got_down.T, sizes)
    assert (got_up.gather(0, got_up.abs().argmax(0, keepdim=True)) > 0).all()
    mixed_RR = torch.linalg.qr(drawn(seed + 2, rank, rank)).Q * torch.arange(1.0, rank + 1)
    other_up, other_down = canonical(up_OR @ mixed_RR, torch.linalg.solve(mixed_RR, down_RI))
    assert_close(other_up, got_up, rtol=1e-5, atol=1e-5)
    assert_close(other_down, got_down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("lam", [0.0, 2.0])
def test_factor_is_the_canonical_form_of_what_is_kept(basis, lam):
    weight_OI, (x_NI, g_NO) = drawn(50, 6, 7), tokens(0, 20, 7, 6)
    known = curvature(x_NI, g_NO)
    parts = components(weight_OI, known, basis)
    scores = gcs_of([-piece for piece in pieces(parts)], x_NI, g_NO, lam).tolist()
    kept = [0, *sorted(range(1, 6), key=lambda k: -scores[k])[:2]]
    up, down = factor(parts, known, 3, lam)
    assert up.dtype == down.dtype == torch.float32
    product = sum(pieces(parts)[k] for k in kept)
    u_OR, size_R, v_RI = torch.linalg.svd(product)
    assert_close(up @ down, product.float())
    assert_close(up.abs(), (u_OR[:, :3] * size_R[:3].sqrt()).abs().float())
    assert_close(down.abs(), (size_R[:3].sqrt()[:, None] * v_RI[:3]).abs().float())


def test_float32_suffices_for_the_whitened_basis():
    """As uneven as activations get: some directions a million times as large as others, and so the gradients."""
    uneven, turn = torch.logspace(-3, 3, 48, dtype=torch.float64), torch.linalg.qr(drawn(5, 48, 48)).Q
    x_NI, g_NO = drawn(0, 96, 48) * uneven @ turn, drawn(1, 96, 48) * uneven.flip(0) @ turn.T
    weight_OI = drawn(2, 48, 48).bfloat16()
    known = curvature(x_NI.float(), g_NO.float())
    up, down = factor(components(weight_OI, known, "whitened"), known, 48, 0.0)
    assert (up @ down - weight_OI.float()).norm() < 3e-5 * weight_OI.float().norm()


def test_damping_grows_the_sizes():
    weight_OI, (x_NI, g_NO) = drawn(50, 6, 7), tokens(0, 4, 7, 6)
    known = curvature(x_NI, g_NO)
    sizes = [components(weight_OI, known, "whitened", damping).size_K for damping in (1e-6, 1e-3, 1.0)]
    assert (sizes[0] < sizes[1]).all()
    assert (sizes[1] < sizes[2]).all()


@pytest.mark.parametrize("basis", BASES)
def test_what_is_protected_stays_in_the_factors(basis):
    """With λ so large that the slopes alone decide, protection changes which components stay."""
    weight_OI, (x_NI, g_NO) = drawn(50, 6, 7), tokens(0, 20, 7, 6)
    known = curvature(x_NI, g_NO)
    parts = components(weight_OI, known, basis)
    product = torch.matmul(*factor(parts, known, 3, 1e6, protect=0.5))
    assert_close(product, sum(pieces(parts)[:3]).float())
    assert (torch.matmul(*factor(parts, known, 3, 1e6, protect=0.0)) - product).abs().max() > 1e-3


@given(cases(), st.sampled_from(BASES), st.data())
def test_joint_costs_of_what_is_dropped(case, basis, data):
    """By changes formed densely, in another curvature than the one that chose the basis."""
    weight, x, g = case
    parts = components(weight, curvature(x, g), basis)
    other = curvature(*tokens(data.draw(st.integers(0, 99)), 7, *weight.shape[::-1]))
    count = len(parts.size_K)
    kept = [sorted(data.draw(st.sets(st.integers(0, count - 1)))) for _ in range(3)]
    found = joint_costs(parts, other, [torch.tensor(one, dtype=torch.int64) for one in kept])
    for one, lost in zip(kept, found, strict=True):
        delta = sum((piece for k, piece in enumerate(pieces(parts)) if k not in one), torch.zeros_like(weight))
        hessian = torch.kron(other.gradients.dense(), other.inputs.dense())
        assert lost == pytest.approx((delta.flatten() @ hessian @ delta.flatten()).item(), rel=1e-6, abs=1e-7)
        assert lost == pytest.approx((delta * apply(other, delta)).sum().item(), rel=1e-6, abs=1e-7)
