"""LISA: draws that are held, and the optimizer's state of layers that leave, against a plain loop."""

import itertools

import pytest
import torch
from support.oracles import summed_loss
from support.tiny import batch
from support.trainers import adapted, weights

from siftune import LISA
from siftune.base.errors import RecipeError, UnsupportedError
from siftune.engine.groups import group_by_layer


def drawn(steps, **settings):
    with LISA(**settings).attach(adapted(layers=8)) as sift:
        return [sift.last.layers, *(sift.step().layers for _ in range(steps - 1))]


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_layers_are_held_for_an_interval(interval):
    layers = drawn(60, active=2, interval=interval)
    spans = [set(layers[start : start + interval]) for start in range(0, 60, interval)]
    assert all(len(span) == 1 for span in spans)
    assert len(set.union(*spans)) > 5


@pytest.mark.parametrize(("active", "count"), [(1, 1), (8, 8), (0.25, 2), (0.01, 1), (1.0, 8)])
def test_active_is_a_count_or_a_share(active, count):
    assert {len(layers) for layers in drawn(6, active=active, interval=2)} == {count}


def test_layers_without_adapters_are_not_drawn():
    model = adapted(targets=["layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj"])
    with LISA(active=1, interval=1).attach(model) as sift:
        assert {sift.step().layers for _ in range(20)} == {(1,), (3,)}
    with pytest.raises(RecipeError, match=r"lisa\.active"):
        LISA(active=3).attach(model)


def test_it_is_a_loop_with_a_new_optimizer_for_every_visit_of_a_layer():
    model, oracle = adapted(layers=6).double(), adapted(layers=6).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    own = {group.index: list(group.parameters.values()) for group in group_by_layer(model)}
    chosen = []
    with LISA(active=2, interval=3, seed=3).attach(model, optimizer=optimizer) as sift:
        for step in range(15):
            chosen.append(sift.last.layers)
            summed_loss(model, batch(model, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            remembered = set(chosen[-1]) & set(sift.last.layers)
            assert set(optimizer.state) == {p for number in remembered for p in own[number]}
    groups = {group.index: list(group.parameters.values()) for group in group_by_layer(oracle)}
    optimizers = {}
    for step, layers in enumerate(chosen):
        optimizers = {number: each for number, each in optimizers.items() if number in layers}
        for number in layers:
            optimizers.setdefault(number, torch.optim.AdamW(groups[number], lr=1e-2, weight_decay=0.1))
        summed_loss(oracle, batch(oracle, seed=step)).backward()
        for number in layers:
            optimizers[number].step()
        oracle.zero_grad()
    assert any(set(a) & set(b) and a != b for a, b in itertools.pairwise(chosen))  # a layer stays, another leaves
    for name, value in weights(oracle).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-10, atol=1e-12)


def test_paged_optimizers_are_refused():
    """As those of bitsandbytes, which keep the memory of a state that was dropped."""
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.is_paged = True
    sift = LISA(active=2, interval=1).attach(model, optimizer=optimizer)
    with sift, pytest.raises(UnsupportedError, match="without paging"):
        sift.step()
