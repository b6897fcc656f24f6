"""Cut: the layers that train, the end of backward, and the mean step."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.tiny import batch
from support.trainers import adapted, train, weights

from siftune import Cut
from siftune.engine.groups import group_by_layer
from siftune.methods import cut
from siftune.methods.cut import draw_depth, lowest_layer

shares = st.tuples(st.integers(1, 40), st.integers(0, 39)).map(lambda pair: Fraction(pair[1] % pair[0], pair[0]))


@given(depth=shares, layers=st.integers(1, 80))
@example(depth=Fraction(13, 23), layers=23)  # whose product of floats is 12.999…
def test_the_cut_is_the_floor_of_the_exact_product(depth, layers):
    assert lowest_layer(float(depth), layers) == depth.numerator * layers // depth.denominator


def test_one_layer_trains_at_any_depth():
    assert [lowest_layer(1 - 1e-15, layers) for layers in (1, 4, 30)] == [0, 3, 29]


def test_a_depth_is_drawn_as_often_as_it_is_listed():
    generator, draws = torch.Generator().manual_seed(0), 8000
    counts = Counter(draw_depth((0.25, 0.25, 0.5, 0.75), generator) for _ in range(draws))
    assert set(counts) == {0.25, 0.5, 0.75}
    for depth, chance in ((0.25, 1 / 2), (0.5, 1 / 4), (0.75, 1 / 4)):
        assert counts[depth] / draws == pytest.approx(chance, abs=4 * (chance * (1 - chance) / draws) ** 0.5)


def test_all_layers_above_the_cut_train_with_draws_independent_of_the_last():
    steps = 2000
    with Cut().attach(adapted(layers=8)) as sift:
        chosen = [sift.last.layers, *(sift.step().layers for _ in range(steps - 1))]
    assert {layers[0]: layers for layers in chosen} == {low: tuple(range(low, 8)) for low in (0, 2, 4, 6)}
    again = sum(one == other for one, other in itertools.pairwise(chosen)) / (steps - 1)
    assert again == pytest.approx(1 / 4, abs=4 * (3 / 16 / steps) ** 0.5)


def test_shares_are_of_the_layers_with_trainable_parameters(monkeypatch):
    model = adapted(targets=["layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj"])
    for depth, layers in ((0.5, (3,)), (0.49, (1, 3))):
        monkeypatch.setattr(cut, "DEPTHS", (depth,))
        with Cut().attach(model) as sift:
            assert sift.last.layers == layers


def test_the_mean_step_of_sgd_is_plain_trainings_times_the_chance():
    """One step from the same weights, once for each of the four depths."""

    def moved(method):
        model = adapted().double()
        start = weights(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.2)
        sift = method.attach(model, optimizer=optimizer) if method else None
        lowest = sift.last.layers[0] if sift else None
        model(**batch(model)).loss.backward()
        optimizer.step()
        return lowest, {name: value - start[name] for name, value in weights(model).items()}

    steps, seed = {}, 0
    while len(steps) < 4:
        lowest, step = moved(Cut(seed=seed))
        steps[lowest] = step
        seed += 1
    for name, plain in moved(None)[1].items():
        mean = torch.stack([step[name] for step in steps.values()]).mean(0)
        p = (int(name.split(".layers.")[1].split(".")[0]) + 1) / 4
        torch.testing.assert_close(mean, p * plain, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("depth", "reentrant"), [(0.25, False), (0.75, True)])
def test_layers_below_save_nothing_and_are_not_recomputed(monkeypatch, depth, reentrant):
    monkeypatch.setattr(cut, "DEPTHS", (depth,))
    model, passes, packed = adapted().train(), Counter(), Counter()
    inside = []
    for number, group in enumerate(group_by_layer(model)):
        group.module.register_forward_pre_hook(lambda *_, number=number: inside.append(number))
        group.module.register_forward_hook(lambda *_: inside.clear())
        group.module.mlp.register_forward_pre_hook(lambda *_, number=number: passes.update([number]))
    with Cut().attach(model):
        saved = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (packed.update(inside), tensor)[1], lambda tensor: tensor
        )
        with saved:
            loss = model(**batch(model)).loss
        loss.backward()
        low = int(4 * depth)
        assert {number for number in packed if packed[number]} == set(range(low, 4))
        passes.clear()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**batch(model)).loss.backward()
    assert passes == {number: 2 if number >= low else 1 for number in range(4)}


def test_at_a_depth_of_zero_it_is_plain_training_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(cut, "DEPTHS", (0.0,))
    plain, ours = train(tmp_path, max_steps=8)[0], train(tmp_path, Cut(), max_steps=8)[0]
    assert all(torch.equal(value, weights(ours)[name]) for name, value in weights(plain).items())
