"""The masked update: a loop that takes steps back, plain training at its limit and on average."""

import itertools
from collections import Counter

import pytest
import torch
from support.seen import Seen, assert_same
from support.trainers import adapted, train, weights

from lab.pays.masked_update import MaskedUpdate
from siftune.engine.groups import group_by_layer

PLAIN = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.1}


def recorded(**settings):
    method, kept = MaskedUpdate(**settings), []
    method.on_select = kept.append
    return method, kept


def test_it_is_a_loop_that_puts_layers_back(tmp_path):
    """Moments of every layer move in every step; of the values only those of the layers that are kept."""
    method, kept = recorded(seed=1)
    model, loop = adapted(), adapted().train()
    seen = Seen(model)
    _, trainer = train(tmp_path, method, model=model, **PLAIN)
    optimizer = torch.optim.AdamW([p for p in loop.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for layers, inputs in zip(kept, seen.all, strict=True):
        loop(**inputs).loss.backward()
        before = weights(loop)
        optimizer.step()
        optimizer.zero_grad()
        for group in group_by_layer(loop):
            for name, parameter in group.parameters.items():
                old = before[f"{group.name}.{name}"]
                parameter.data = old + 2 * (parameter.data - old) if group.index in layers else old
    assert len(set(kept)) > 2
    assert all(len(layers) == 2 for layers in kept)
    for name, value in weights(loop).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-4, atol=1e-5)
    ours, theirs = ([s["exp_avg"] for s in o.state.values()] for o in (trainer.optimizer, optimizer))
    assert len(ours) == len(theirs)
    assert all(float(moment.abs().max()) > 0 for moment in ours)


def test_all_layers_kept_is_plain_training_bit_for_bit(tmp_path):
    (plain, _), (model, _) = train(tmp_path), train(tmp_path, MaskedUpdate(kept=1.0))
    assert_same(weights(plain), weights(model))


def test_the_mean_step_over_all_draws_is_plain_trainings(tmp_path):
    """Also Adam's: one step from the same weights, once for each pair of four layers."""
    start = weights(adapted().double())
    plain, _ = train(tmp_path, model=adapted().double(), max_steps=1, **PLAIN)
    steps, seed = {}, 0
    while len(steps) < 6:
        method, kept = recorded(seed=seed)
        model, _ = train(tmp_path, method, model=adapted().double(), max_steps=1, **PLAIN)
        steps[kept[0]] = {name: value - start[name] for name, value in weights(model).items()}
        seed += 1
    assert set(steps) == set(itertools.combinations(range(4), 2))
    for name, value in weights(plain).items():
        mean = torch.stack([step[name] for step in steps.values()]).mean(0)
        torch.testing.assert_close(mean, value - start[name], rtol=1e-9, atol=1e-12)


def test_every_pair_is_drawn_as_often():
    method, kept = recorded()
    method.on_train_begin(None, None, None, model=adapted())
    for _ in range(1200):
        method.on_pre_optimizer_step(None, None, None)
    chance = 1 / 6
    for count in Counter(kept).values():
        assert count / 1200 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 1200) ** 0.5)
