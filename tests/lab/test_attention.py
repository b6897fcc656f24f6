"""The benchmark of attention measures both ways, of which the second is another one."""

import torch

from lab import attention
from siftune.models import attention as module


def test_both_are_timed_and_only_one_takes_the_products(monkeypatch):
    calls, products = [], module._products
    monkeypatch.setattr(module, "_products", lambda *given: calls.append(given[4]) or products(*given))
    found = attention.milliseconds(8, torch.bfloat16, padded=True, tries=2)
    assert set(found) == {"sdpa", "short_rows"}
    assert len(calls) == 2
