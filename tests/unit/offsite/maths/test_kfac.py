"""Curvature factors against sums over single tokens, Kronecker products and exact Hessians, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.curvature import curvature, moments
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from siftune.base.errors import ModelError
from siftune.offsite.maths import kfac
from siftune.offsite.maths.kfac import apply, score


def drawn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def rows(draw):
    """Fewer rows than features, as many, or more."""
    return drawn(draw(st.integers(0, 999)), draw(st.integers(1, 8)), draw(st.integers(1, 6)))


def oracle(rows_NF):
    """The second moment one token and one entry at a time."""
    count, features = rows_NF.shape
    rows = rows_NF.tolist()
    table = [[sum(row[i] * row[j] for row in rows) / count for j in range(features)] for i in range(features)]
    return torch.tensor(table, dtype=torch.float64).view(features, features)


@given(rows_NF=rows(), columns=st.integers(1, 4), damping=st.sampled_from([1e-3, 0.5]))
def test_moments_are_means_over_tokens(rows_NF, columns, damping):
    got, expected = moments(rows_NF), oracle(rows_NF)
    count, features = rows_NF.shape
    v_FK = drawn(1, features, columns)
    assert got.formed == (count >= features)
    assert got.features == features
    assert_close(got.dense(), expected)
    assert_close(got.times(v_FK), expected @ v_FK)
    assert_close(got.column_norms(), expected.abs().sum(0))
    root = got.root(damping)
    assert torch.equal(root, root.tril())
    assert_close(root @ root.T, expected + damping * expected.trace() / features * torch.eye(features).double())


@pytest.mark.parametrize("count", [3, 30], ids=["rows", "matrix"])
@pytest.mark.parametrize("block", [1, 3, 9, 10])
def test_column_norms_in_blocks(count, block, monkeypatch):
    monkeypatch.setattr(kfac, "_BLOCK", block)
    rows_NF = drawn(0, count, 9)
    assert_close(moments(rows_NF).column_norms(), oracle(rows_NF).abs().sum(0))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that comes to be."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_few_rows_never_become_a_matrix():
    with Largest() as largest:
        got = moments(torch.ones(4, 3000))
        got.times(torch.ones(3000, 2))
        got.column_norms()
    assert largest.numel <= 3000 * 512


@pytest.mark.parametrize(
    ("given", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
@pytest.mark.parametrize("count", [2, 8], ids=["rows", "matrix"])
def test_dtypes(given, kept, count):
    rows_NF = drawn(0, count, 5, dtype=given)
    got = moments(rows_NF)
    for result in (got.values, got.dense(), got.column_norms(), got.times(torch.ones(5, 1)), got.root()):
        assert result.dtype == kept
    assert_close(got.dense(), oracle(rows_NF).to(kept), rtol=1e-5, atol=1e-5)
    assert curvature(rows_NF, rows_NF).slope_OI.dtype == kept


def test_root_without_damping_of_a_singular_matrix():
    rows_NF = drawn(0, 2, 6)
    root = moments(rows_NF).root(0.0)
    assert root.isfinite().all()
    assert_close(root @ root.T, oracle(rows_NF), rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_root_of_nothing_is_the_identity(count):
    got = moments(torch.zeros(count, 3))
    assert torch.equal(got.dense(), torch.zeros(3, 3))
    assert torch.equal(got.root(), torch.eye(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [2, 4])
def test_values_that_are_not_finite_are_refused(bad, count):
    rows_NF = torch.ones(count, 3)
    rows_NF[1, 2] = bad
    for arguments in ((rows_NF, torch.ones(count, 3)), (torch.ones(count, 3), rows_NF)):
        with pytest.raises(ModelError, match="float32"):
            curvature(*arguments)


@given(tokens=st.integers(1, 8), inputs=st.integers(1, 5), outputs=st.integers(1, 5))
def test_apply_is_the_kronecker_product(tokens, inputs, outputs):
    x_NI, g_NO, delta_OI = drawn(0, tokens, inputs), drawn(1, tokens, outputs), drawn(2, outputs, inputs)
    got = apply(curvature(x_NI, g_NO), delta_OI)
    stacked = torch.kron(oracle(x_NI), oracle(g_NO)) @ delta_OI.T.flatten()  # columns of δ one below the other
    assert_close(got, stacked.view(inputs, outputs).T)


def net(inputs=4, hidden=5, classes=3):
    """A net of two linear layers, its weights drawn."""
    layers = nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, classes, bias=False))
    for number, weight in enumerate(layers.parameters()):
        weight.data = drawn(number, *weight.shape)
    return layers.double()


def recorded(layers, x_NI, labels_N):
    """Input and output gradient of both layers for the summed loss, and the gradients of their weights."""
    hidden = layers[0](x_NI)
    inner = layers[1](hidden)
    logits = layers[2](inner)
    loss = nn.functional.cross_entropy(logits, labels_N, reduction="sum")
    grads = torch.autograd.grad(loss, (hidden, logits, *layers.parameters()))
    return [(x_NI, grads[0], grads[2]), (inner.detach(), grads[1], grads[3])]


def test_slope_is_the_gradient():
    for x_NI, g_NO, expected in recorded(net(), drawn(7, 6, 4), torch.arange(6) % 3):
        assert_close(curvature(x_NI, g_NO).slope_OI, expected)


def test_one_token_and_every_label_give_the_exact_hessian():
    """With the gradients that every label would give, as often as the model expects it, G is no estimate any more."""
    x_I, weight_OI, delta_OI = drawn(0, 4), drawn(1, 3, 4), drawn(2, 3, 4)

    def loss(flat):
        return nn.functional.cross_entropy(flat.view(3, 4) @ x_I, torch.tensor(1))

    hessian = torch.autograd.functional.hessian(loss, weight_OI.flatten())
    chance_O = (weight_OI @ x_I).softmax(0)
    g_NO = (chance_O - torch.eye(3)) * (3 * chance_O).sqrt()[:, None]
    got = apply(curvature(x_I.expand(3, 4), g_NO), delta_OI)
    assert_close(got, (hessian @ delta_OI.flatten()).view(3, 4))


def test_curvlinops_has_the_same_factors():
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    layers, x_NI, labels_N = net(), drawn(7, 6, 4), torch.arange(6) % 3
    weights = list(layers.parameters())
    operator = curvlinops.KFACLinearOperator(
        layers,
        nn.CrossEntropyLoss(reduction="sum"),
        weights,
        [(x_NI[:4], labels_N[:4]), (x_NI[4:], labels_N[4:])],
        fisher_type="empirical",
        check_deterministic=False,
    )
    deltas = [drawn(9, *weight.shape) for weight in weights]
    shifts = operator @ deltas
    for (x, g, _), delta, shift in zip(recorded(layers, x_NI, labels_N), deltas, shifts, strict=True):
        assert_close(len(x) * apply(curvature(x, g), delta), shift)  # its G is a sum, ours a mean


numbers = st.lists(st.integers(-99, 99), min_size=2, max_size=6)


@given(numbers=numbers, seed=st.integers(0, 99), lam=st.sampled_from([0, 0.1, 3.0]))
def test_score(numbers, seed, lam):
    shift = [abs(number) / 8 for number in numbers]
    rise = drawn(seed, len(numbers)).tolist()
    mean_shift = sum(shift) / len(shift) or 1.0
    mean_rise = sum(abs(r) for r in rise) / len(rise)
    expected = [s / mean_shift - lam * r / mean_rise for s, r in zip(shift, rise, strict=True)]
    got = score(torch.tensor(shift).double(), torch.tensor(rise).double(), lam)
    assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_a_term_that_is_zero_for_all_counts_as_zero():
    shift, rise, nothing = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -2.0]), torch.zeros(2)
    assert torch.equal(score(shift, nothing, 5.0), torch.tensor([0.5, 1.5]))
    assert torch.equal(score(nothing, rise, 5.0), torch.tensor([-5.0, 5.0]))
    assert torch.equal(score(nothing, nothing, 5.0), nothing)
