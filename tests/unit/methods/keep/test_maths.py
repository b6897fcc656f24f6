"""KL divergence over the most likely tokens and the rest, against a loop over the vocabulary in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.methods.keep.maths import divergence, reference

WIDE = torch.float64


def drawn(positions, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(positions, vocabulary, generator=generator, dtype=WIDE) * 3 for _ in range(2)]


def by_loop(base_NV, model_NV, count):
    """The divergence of each position, class by class."""
    values = []
    for base, model in zip(base_NV.tolist(), model_NV.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, each)) for x in each] for each in (base, model))
        order = sorted(range(len(p)), key=lambda token: -p[token])
        classes = [[token] for token in order[:count]] + [order[count:]]
        pairs = [(sum(p[t] for t in c), sum(q[t] for t in c)) for c in classes if c]
        values.append(sum(one * math.log(one / other) for one, other in pairs))
    return torch.tensor(values, dtype=WIDE)


@given(positions=st.integers(1, 4), vocabulary=st.integers(2, 9), count=st.integers(1, 12), seed=st.integers(0, 99))
def test_value_is_that_of_a_loop(positions, vocabulary, count, seed):
    base, model = drawn(positions, vocabulary, seed)
    torch.testing.assert_close(divergence(model, reference(base, count)), by_loop(base, model, count))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_gradient_is_that_of_finite_differences(count):
    base, model = drawn(2, 8, seed=1)
    kept = reference(base, count)
    assert torch.autograd.gradcheck(lambda logits: divergence(logits, kept), model.requires_grad_())


def test_all_tokens_give_the_complete_divergence():
    base, model = drawn(3, 7, seed=2)
    complete = torch.nn.functional.kl_div(model.log_softmax(1), base.log_softmax(1), log_target=True, reduction="none")
    torch.testing.assert_close(divergence(model, reference(base, 7)), complete.sum(1))


def test_fewer_tokens_give_less():
    base, model = drawn(50, 20, seed=3)
    by_count = torch.stack([divergence(model, reference(base, count)) for count in (1, 4, 16, 20)])
    assert (by_count.diff(dim=0) >= -1e-12).all()
    assert (by_count[0] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_base_has_no_divergence_and_no_gradient(dtype):
    logits = drawn(3, 30, seed=4)[0].to(dtype).requires_grad_()
    value = divergence(logits, reference(logits.detach(), 4))
    value.sum().backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, torch.zeros(3))
    assert logits.grad.abs().max() < 1e-2 if dtype != torch.float32 else logits.grad.abs().max() < 1e-6


def test_small_rest_keeps_its_digits():
    base = torch.tensor([[40.0, 0.0, 0.0]])
    assert float(reference(base, 1).rest_N) == pytest.approx(math.log(2) - 40, rel=1e-6)
