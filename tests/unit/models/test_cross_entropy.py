"""Cross entropy in parts, against torch's in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from siftune.models import loss as module
from siftune.models.loss import cross_entropy


def both(logits, targets, towards):
    """Losses and gradients: ours, and torch's in float64 of the same numbers."""
    found = []
    for function, dtype in ((cross_entropy, logits.dtype), (functional.cross_entropy, torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        losses = function(leaf, targets) if function is cross_entropy else function(leaf, targets, reduction="none")
        (gradient,) = torch.autograd.grad(losses, leaf, towards.to(losses.dtype))
        found.append((losses.detach(), gradient))
    return found


@settings(deadline=None, max_examples=40)
@given(
    labels=st.integers(0, 9), vocabulary=st.integers(1, 12), at_a_time=st.integers(1, 60),
    scale=st.sampled_from([1, 30]), seed=st.integers(0, 99),
)  # fmt: skip
def test_losses_and_gradients_are_torchs_however_many_labels_go_at_a_time(labels, vocabulary, at_a_time, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(labels, vocabulary, generator=generator) * scale
    targets = torch.randint(vocabulary, (labels,), generator=generator)
    towards = torch.randn(labels, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_A_TIME", {"cpu": at_a_time})
        (losses, gradient), (wanted, wanted_gradient) = both(logits, targets, towards)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=2e-6)


def test_in_float64_nothing_is_rounded():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ours, theirs in zip(*both(logits, torch.arange(7), torch.ones(7)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_only_the_gradient_is_rounded(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 300, generator=generator) * 3).to(dtype)
    targets = torch.randint(300, (7,), generator=generator)
    (losses, gradient), (wanted, wanted_gradient) = both(logits, targets, torch.full((7,), 0.25))
    assert (losses.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient.to(dtype), rtol=1e-2, atol=1e-7)


def test_a_token_that_cannot_come_has_no_gradient_and_as_a_label_an_endless_loss():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, -math.inf, 1.0]])
    (losses, gradient), (wanted, _) = both(logits, torch.tensor([2, 1]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(losses.double(), wanted)
    assert losses[1] == math.inf
    assert gradient[0, 1] == 0


def test_what_all_logits_have_in_common_costs_no_digits():
    logits = torch.randint(0, 64, (5, 9), generator=torch.Generator().manual_seed(0)) / 8 + 10_000
    (losses, gradient), (wanted, wanted_gradient) = both(logits, torch.arange(5), torch.ones(5))
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-6)


def test_memory_is_of_a_few_labels_at_a_time():
    sizes = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                sizes.append(found.numel())
            return found

    logits = torch.randn(64, 2**16).bfloat16().requires_grad_()
    with Watched():
        cross_entropy(logits, torch.zeros(64, dtype=torch.int64)).sum().backward()
    assert max(sizes) == 2**18  # of 2**22
