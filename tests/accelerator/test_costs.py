"""No step launches more operations, or waits more often, than the committed table says.

If a step needs fewer, or a library changes, write the table anew: see `support.standin.costs`.
"""

import json

import pytest
from support.standin import costs

from siftune.methods.gast.callback import AlignedSamples

pytestmark = pytest.mark.compiled

TABLE = json.loads(costs.TABLE.read_text())
WAITS = 8  # in a step of any method


@pytest.mark.parametrize("name", costs.CASES)
def test_a_step_costs_no_more_than_the_table_says(name):
    cost = costs.measure(name)
    assert cost["waits"] <= TABLE[name]["waits"] <= WAITS
    assert cost["operations"] <= TABLE[name]["operations"] * 1.001  # batches differ in their masks


def test_rows_are_selected_at_few_operations():
    assert costs.measure("gast, rest")["operations"] <= 1.25 * TABLE["dense"]["operations"]


def test_a_wait_in_backward_is_noticed(monkeypatch):
    score = AlignedSamples._score

    def with_wait(self, grads):
        scored = score(self, grads)
        float(scored.scores.sum())
        return scored

    monkeypatch.setattr(AlignedSamples, "_score", with_wait)
    assert costs.measure("gast, rest")["waits"] >= TABLE["gast, rest"]["waits"] + costs.LAYERS
