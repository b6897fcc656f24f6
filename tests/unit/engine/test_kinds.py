"""Gradients of single rows against autograd of one row at a time, and sums and products against loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from siftune.base import numerics
from siftune.engine import kinds as per_sample

HALF = (torch.float16, torch.bfloat16)

sizes = st.integers(1, 4)
positions = st.lists(st.integers(1, 3), max_size=3).map(tuple)  # none: rows and values only
some_positions = positions.filter(len)
parameters = st.lists(sizes, min_size=1, max_size=3).map(tuple)  # the shape of a parameter


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got, expected):
    assert got.dtype == torch.float64
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


def row_gradients(use, weight, inputs, grads):
    """The gradient for `weight` of every row, each from a graph of its own."""
    found = []
    for row, grad in zip(inputs, grads, strict=True):
        leaf = weight.clone().requires_grad_()
        found.append(torch.autograd.grad(use(row, leaf), leaf, grad)[0])
    return torch.stack(found)


@given(rows=sizes, between=some_positions, ins=sizes, outs=sizes, seed=st.integers(0, 99))
def test_weight_of_a_linear_map(rows, between, ins, outs, seed):
    x_BTI, g_BTO = normal(rows, *between, ins, seed=seed), normal(rows, *between, outs, seed=seed + 1)
    expected = row_gradients(nn.functional.linear, normal(outs, ins), x_BTI, g_BTO)
    close(per_sample.linear_weight(g_BTO, x_BTI), expected)


@given(rows=sizes, between=some_positions, ins=sizes, outs=sizes, seed=st.integers(0, 99))
def test_weight_of_a_linear_map_by_loops(rows, between, ins, outs, seed):
    x_BTI, g_BTO = normal(rows, *between, ins, seed=seed), normal(rows, *between, outs, seed=seed + 1)
    expected = torch.zeros(rows, outs, ins, dtype=torch.float64)
    for b, o, i in itertools.product(range(rows), range(outs), range(ins)):
        for place in itertools.product(*map(range, between)):
            expected[b, o, i] += g_BTO[(b, *place, o)] * x_BTI[(b, *place, i)]
    close(per_sample.linear_weight(g_BTO, x_BTI), expected)
    close(per_sample.transposed_weight(g_BTO, x_BTI), expected.transpose(1, 2))


@given(rows=sizes, between=some_positions, ins=sizes, outs=sizes, seed=st.integers(0, 99))
def test_weight_of_a_conv1d(rows, between, ins, outs, seed):
    x_BTI, g_BTO = normal(rows, *between, ins, seed=seed), normal(rows, *between, outs, seed=seed + 1)
    expected = row_gradients(torch.matmul, normal(ins, outs), x_BTI, g_BTO)
    close(per_sample.transposed_weight(g_BTO, x_BTI), expected)


@given(rows=sizes, between=positions, outs=sizes, seed=st.integers(0, 99))
def test_bias(rows, between, outs, seed):
    y_BTO, g_BTO = normal(rows, *between, outs, seed=seed), normal(rows, *between, outs, seed=seed + 1)
    close(per_sample.added_bias(g_BTO), row_gradients(torch.add, normal(outs), y_BTO, g_BTO))


@given(rows=sizes, between=positions, outs=sizes, eps=st.floats(1e-6, 2.0), seed=st.integers(0, 99))
def test_weight_of_a_layer_norm(rows, between, outs, eps, seed):
    x_BTO, g_BTO = 3 + normal(rows, *between, outs, seed=seed), normal(rows, *between, outs, seed=seed + 1)

    def use(row, weight):
        centred = row - row.mean(-1, keepdim=True)
        return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    close(per_sample.norm_weight(g_BTO, x_BTO, eps), row_gradients(use, normal(outs), x_BTO, g_BTO))


@given(half=sizes, shape=parameters, seed=st.integers(0, 99))
def test_pairs_are_row_i_and_row_i_plus_half(half, shape, seed):
    grads = normal(2 * half, *shape, seed=seed)
    close(per_sample.over_pairs(grads), torch.stack([grads[i] + grads[i + half] for i in range(half)]))


@given(rows=sizes, shape=parameters, seed=st.integers(0, 99))
def test_squares(rows, shape, seed):
    grads = normal(rows, *shape, seed=seed)
    values = [row.flatten().tolist() for row in grads]
    lengths = [math.fsum(a * a for a in row) for row in values]
    close(numerics.squares(grads), torch.tensor(lengths, dtype=torch.float64))


@given(rows=sizes, shape=parameters, data=st.data())
def test_sum_of_some_rows_as_often_as_they_are_named(rows, shape, data):
    named = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=7))
    grads = normal(rows, *shape)
    expected = torch.zeros(shape, dtype=torch.float64)
    for row in named:
        expected = expected + grads[row]
    close(numerics.sum_of(grads, torch.tensor(named)), expected)


def test_sum_of_no_rows_is_zero():
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(numerics.sum_of(normal(3, 2, 2), none), torch.zeros(2, 2, dtype=torch.float64))


@given(rows=sizes, parts=sizes)
def test_parameters_of_a_unit_add_up(rows, parts):
    given_parts = [normal(rows, seed=part) for part in range(parts)]
    expected = [math.fsum(float(part[row]) for part in given_parts) for row in range(rows)]
    close(numerics.added(tuple(given_parts)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_dtype_of_sums(dtype):
    grads = normal(3, 2, 4, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert numerics.squares(grads).dtype == wide
    assert numerics.sum_of(grads, torch.tensor([0, 2])).dtype == wide
    assert numerics.added([numerics.squares(grads)] * 2).dtype == wide


@pytest.mark.parametrize("dtype", HALF)
def test_halves_are_summed_in_float32(dtype):
    """300² and 4096 + 1 fit float32, and neither float16 nor bfloat16."""
    large = torch.full((2, 4), 300.0, dtype=dtype)
    square = float(large[0, 0]) ** 2
    assert numerics.squares(large).tolist() == pytest.approx([4 * square] * 2)
    steps = torch.tensor([[4096.0], [1.0], [1.0], [1.0]], dtype=dtype)
    assert numerics.sum_of(steps, torch.tensor([0, 1, 2, 3, 3])).tolist() == [4100.0]


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_rows_have_the_dtype_of_the_output_gradient(dtype):
    g_BTO, x_BTI = normal(2, 3, 4, dtype=dtype), normal(2, 3, 5, seed=1, dtype=torch.float32)
    linear, transposed = per_sample.linear_weight(g_BTO, x_BTI), per_sample.transposed_weight(g_BTO, x_BTI)
    assert linear.dtype == transposed.dtype == per_sample.added_bias(g_BTO).dtype == dtype
    expected = torch.einsum("bto,bti->boi", g_BTO.double(), x_BTI.to(dtype).double())
    bound = 4 * torch.finfo(dtype).eps
    assert_close(linear.double(), expected, rtol=bound, atol=bound)
    assert_close(transposed.double(), expected.transpose(1, 2), rtol=bound, atol=bound)
    assert per_sample.over_pairs(g_BTO).dtype == dtype


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_wider_output_gradient_widens_the_input(wide):
    g_BTO, x_BTI = normal(2, 3, 4, dtype=wide), normal(2, 3, 5, seed=1, dtype=torch.float16)
    expected = torch.einsum("bto,bti->boi", g_BTO.double(), x_BTI.double())
    assert per_sample.linear_weight(g_BTO, x_BTI).dtype == per_sample.transposed_weight(g_BTO, x_BTI).dtype == wide
    assert_close(per_sample.linear_weight(g_BTO, x_BTI).double(), expected, rtol=1e-6, atol=1e-6)


def test_rows_do_not_touch_each_other():
    g_BTO, x_BTI = normal(3, 2, 4), normal(3, 2, 5, seed=1)
    for rows in ([0], [2, 0], [1, 1, 2]):
        part = per_sample.linear_weight(g_BTO[rows], x_BTI[rows])
        close(part, per_sample.linear_weight(g_BTO, x_BTI)[rows])
        close(per_sample.norm_weight(g_BTO[rows], g_BTO[rows], 0.1), per_sample.norm_weight(g_BTO, g_BTO, 0.1)[rows])
