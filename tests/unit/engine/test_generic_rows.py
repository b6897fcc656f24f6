"""Modules that run again: row by row where they cannot be traced, which is said, and not where memory is short."""

import pytest
import torch
from peft import VeraConfig
from support.adapted import from_config

from siftune.engine import generic_rows
from siftune.engine.generic_rows import ModuleRows
from siftune.engine.groups import group_by_layer
from siftune.engine.kinds import runs_again
from siftune.engine.substitution import units


@pytest.fixture
def given():
    """A module, what stands for its parameters, output gradients and inputs of three rows."""
    model = from_config(VeraConfig(r=4, target_modules=["q_proj"])).double()
    unit = next(unit for group in group_by_layer(model) for unit in units(group) if runs_again(unit.module))
    values = {p: p.detach() + 0.1 for p in unit.parameters.values()}
    base = unit.module.get_base_layer()
    rows = torch.randn(3, 4, base.in_features, dtype=torch.float64)
    return unit, values, torch.randn(3, 4, base.out_features, dtype=torch.float64), rows


def failing(error):
    def vmap(*_, **__):
        raise error

    return vmap


def test_row_by_row_it_is_the_same_and_said_once(given, monkeypatch, caplog):
    unit, *values = given
    wanted = ModuleRows(unit).gradients(*values)
    assert not caplog.records
    monkeypatch.setattr(torch.func, "vmap", failing(RuntimeError("no rule")))
    generic_rows._tell_of_rows.cache_clear()
    for _ in range(2):
        found = ModuleRows(unit).gradients(*values)
        assert found.keys() == wanted.keys()
        for parameter, grads in wanted.items():
            assert grads.abs().max() > 0
            torch.testing.assert_close(found[parameter], grads, rtol=1e-12, atol=1e-14)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("torch.func cannot trace modules of vera")


def test_short_memory_is_no_reason_to_go_row_by_row(given, monkeypatch):
    unit, *values = given
    monkeypatch.setattr(torch.func, "vmap", failing(torch.OutOfMemoryError("short")))
    with pytest.raises(torch.OutOfMemoryError):
        ModuleRows(unit).gradients(*values)
