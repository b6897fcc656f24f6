"""LISA: draws that are held, the optimizer's state of layers that leave, and an obvious loop beside it."""

import itertools

import pytest
import torch
from support.oracles import summed_loss
from support.seen import Seen, assert_same
from support.tiny import batch
from support.trainers import adapted, train, weights

from siftune import LISA, RST
from siftune.base.errors import RecipeError
from siftune.engine.groups import group_by_layer


def recorded(**settings):
    method, chosen = LISA(**settings), []
    method.on_select = chosen.append
    return method, chosen


def drawn(steps, **settings):
    """The layers of some steps of a plain loop on eight layers."""
    with LISA(**settings).attach(adapted(layers=8)) as sift:
        return [sift.last.layers, *(sift.step().layers for _ in range(steps - 1))]


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_layers_are_held_for_an_interval_and_drawn_anew_then(interval):
    layers = drawn(60, active=2, interval=interval)
    spans = [set(layers[start : start + interval]) for start in range(0, 60, interval)]
    assert all(len(span) == 1 for span in spans)
    assert len(set.union(*spans)) > 5


def test_every_layer_is_drawn_as_often():
    layers = drawn(4000, active=2, interval=1)
    for number in range(8):
        share = sum(number in chosen for chosen in layers) / len(layers)
        assert share == pytest.approx(2 / 8, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


@pytest.mark.parametrize(("active", "count"), [(1, 1), (3, 3), (8, 8), (0.25, 2), (0.01, 1), (1.0, 8)])
def test_active_is_a_count_or_a_share(active, count):
    assert {len(layers) for layers in drawn(6, active=active, interval=2)} == {count}


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(RecipeError, match=r"^lisa\.active is 5, but only 4 layers have something to train$"):
        LISA(active=5).attach(adapted())


def test_layers_without_adapters_are_not_drawn():
    model = adapted(targets=["layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj"])
    with LISA(active=1, interval=1).attach(model) as sift:
        assert {sift.step().layers for _ in range(20)} == {(1,), (3,)}
    with pytest.raises(RecipeError, match="only 2 layers"):
        LISA(active=3).attach(model)


def state_bytes(optimizer, parameters):
    tensors = [t for p in parameters for t in optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("keep", [False, True])
def test_the_optimizer_forgets_layers_that_leave(keep):
    model = adapted(layers=6)
    groups = {group.index: list(group.parameters.values()) for group in group_by_layer(model)}
    parameters = [p for own in groups.values() for p in own]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    visited = set()
    with LISA(active=2, interval=3, keep_state=keep).attach(model, optimizer=optimizer) as sift:
        for _ in range(12):
            active = sift.last.layers
            visited |= {*active}
            model(**batch(model)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            remembered = visited if keep else set(active) & set(sift.last.layers)
            assert {n for n, own in groups.items() if all(p in optimizer.state for p in own)} == remembered
            assert {n for n, own in groups.items() if any(p in optimizer.state for p in own)} == remembered
            whole = state_bytes(optimizer, list(optimizer.state))
            assert whole == sum(2 * 4 * p.numel() + 4 for n in remembered for p in groups[n])  # two means, a step
            assert whole == state_bytes(optimizer, [p for n in remembered for p in groups[n]])
    assert len(visited) > 3


@pytest.mark.parametrize("keep", [False, True])
def test_it_is_a_loop_that_trains_those_layers(keep):
    """float64, with an optimizer of its own for every visit of a layer, or for the layer's whole life."""
    model, oracle = adapted(layers=6).double(), adapted(layers=6).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    chosen = []
    with LISA(active=2, interval=3, keep_state=keep, seed=3).attach(model, optimizer=optimizer) as sift:
        for step in range(15):
            chosen.append(sift.last.layers)
            summed_loss(model, batch(model, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    groups = {group.index: list(group.parameters.values()) for group in group_by_layer(oracle)}
    optimizers = {}
    for step, layers in enumerate(chosen):
        if not keep:
            optimizers = {number: own for number, own in optimizers.items() if number in layers}
        for number in layers:
            optimizers.setdefault(number, torch.optim.AdamW(groups[number], lr=1e-2, weight_decay=0.1))
        summed_loss(oracle, batch(oracle, seed=step)).backward()
        for number in layers:
            optimizers[number].step()
        oracle.zero_grad()
    assert any(set(a) & set(b) and a != b for a, b in itertools.pairwise(chosen))  # a layer stays, another leaves
    for name, value in weights(oracle).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [False, True])
def test_the_trainer_trains_those_layers(tmp_path, keep):
    method, chosen = recorded(active=2, interval=3, keep_state=keep)
    model, oracle = adapted(layers=6), adapted(layers=6).train()
    seen = Seen(model)
    settings = {"max_steps": 9, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    _, trainer = train(tmp_path, method, model=model, **settings)
    groups = {group.index: list(group.parameters.values()) for group in group_by_layer(oracle)}
    optimizer = torch.optim.AdamW([p for own in groups.values() for p in own], lr=1e-2, weight_decay=0.0)
    for choice, inputs in zip(chosen, seen.all, strict=True):
        oracle(**inputs).loss.backward()
        for parameter in (p for number, own in groups.items() if number not in choice.layers for p in own):
            parameter.grad = None
            if not keep:
                optimizer.state.pop(parameter, None)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(oracle).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-5, atol=1e-6)
    state = trainer.optimizer.state
    remembered = {g.index for g in group_by_layer(model) if any(p in state for p in g.parameters.values())}
    assert remembered == set(itertools.chain(*(c.layers for c in (chosen if keep else chosen[-1:]))))


# within an interval, at its end, within the next
@pytest.mark.parametrize(("stop", "keep"), [(2, False), (3, True), (4, False)])
def test_resume_within_an_interval_is_bitwise_the_unbroken_run(tmp_path, stop, keep):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": stop}
    own = {"active": 2, "interval": 3, "keep_state": keep}
    (whole, wanted), (again, chosen) = recorded(**own), recorded(**own)
    unbroken, _ = train(tmp_path, whole, model=adapted(layers=6), **settings)
    resumed, _ = train(
        tmp_path, again, model=adapted(layers=6), resume=str(tmp_path / f"checkpoint-{stop}"), **settings
    )
    assert [c.layers for c in chosen] == [c.layers for c in wanted[stop:]]
    assert_same(weights(unbroken), weights(resumed))


def test_held_for_one_step_and_forgetting_nothing_it_is_rst(tmp_path):
    (lisa, drawn_by_lisa), (rst, drawn_by_rst) = (
        recorded(active=0.5, interval=1, keep_state=True),
        (RST(active=0.5), []),
    )
    rst.on_select = drawn_by_rst.append
    (first, _), (second, _) = train(tmp_path, lisa), train(tmp_path, rst)
    assert [c.layers for c in drawn_by_lisa] == [c.layers for c in drawn_by_rst]
    assert_same(weights(first), weights(second))
