"""Values as strict JSON can hold them."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from siftune.base.text import jsonable


@dataclass
class Pair:
    values: np.ndarray
    inner: "Pair | None" = None


@pytest.mark.parametrize("value", [1, 1.5, True, None, "ü", [1, [2]], {"a": {"b": None}}])
def test_what_json_can_hold_stays(value):
    assert jsonable(value) == value
    assert type(jsonable(value)) is type(value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({1: float("inf")}, {"1": None}),
        (torch.tensor(2), 2),
        (MappingProxyType({"a": float("nan")}), {"a": None}),
        (torch.tensor([[1.5, float("nan")]]), [[1.5, None]]),
        (np.float64("nan"), None),
        (np.array([1, 2]), [1, 2]),
        (np.bool_(True), True),
        ({Path("a"): (Path("b"), {3})}, {"a": ["b", [3]]}),
        (torch.float32, "torch.float32"),
        (Pair(np.ones(1), Pair(np.zeros(2))), {"values": [1.0], "inner": {"values": [0.0, 0.0], "inner": None}}),
        (Pair, str(Pair)),
    ],
)
def test_what_it_cannot_is_brought_into_its_types(value, plain):
    assert jsonable(value) == plain
    json.dumps(jsonable(value), allow_nan=False)
