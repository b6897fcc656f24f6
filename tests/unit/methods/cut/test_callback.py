"""Cut: which layers train, where backward ends, and the mean step."""

import itertools
from collections import Counter

import pytest
import torch
from support.tiny import batch
from support.trainers import adapted, weights

from siftune import Cut
from siftune.base.errors import RecipeError
from siftune.engine.groups import group_by_layer

LOWEST = ("layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj")


def drawn(steps, layers=8, **settings):
    with Cut(**settings).attach(adapted(layers=layers)) as sift:
        return [sift.last.layers, *(sift.step().layers for _ in range(steps - 1))]


def parameters_of(model):
    return {group.index: list(group.parameters.values()) for group in group_by_layer(model)}


def test_all_layers_above_the_cut_train_each_as_often_as_its_chance():
    steps = 4000
    chosen = drawn(steps, depths=(0.25, 0.25, 0.5, 0.75))
    assert {layers[0]: layers for layers in chosen} == {low: tuple(range(low, 8)) for low in (2, 4, 6)}
    counts = Counter(layer for layers in chosen for layer in layers)
    for layer, chance in enumerate([0, 0, 0.5, 0.5, 0.75, 0.75, 1, 1]):
        assert counts[layer] / steps == pytest.approx(chance, abs=4 * (chance * (1 - chance) / steps) ** 0.5)


def test_a_cut_is_drawn_without_regard_to_the_last():
    lowest = [layers[0] for layers in drawn(1200)]
    again = sum(one == other for one, other in itertools.pairwise(lowest)) / 1199
    assert again == pytest.approx(1 / 4, abs=4 * (3 / 16 / 1199) ** 0.5)


def test_shares_are_of_the_layers_that_have_something_to_train():
    model = adapted(targets=list(LOWEST))
    with Cut(depths=(0.5,)).attach(model) as sift:
        assert sift.last.layers == (3,)
    with Cut(depths=(0.49,)).attach(model) as sift:
        assert sift.last.layers == (1, 3)


def test_the_mean_step_of_sgd_is_the_chance_times_plain_trainings():
    """One step from the same weights, once for each of the four depths."""

    def moved(cut):
        model = adapted().double()
        start = weights(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.2)
        sift = cut.attach(model, optimizer=optimizer) if cut else None
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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("depth", [0.25, 0.75])
def test_layers_below_are_neither_kept_nor_computed_again(depth, reentrant):
    model, passes, packed = adapted().train(), Counter(), Counter()
    inside = []
    for number, group in enumerate(group_by_layer(model)):
        group.module.register_forward_pre_hook(lambda *_, number=number: inside.append(number))
        group.module.register_forward_hook(lambda *_: inside.clear())
        group.module.mlp.register_forward_pre_hook(lambda *_, number=number: passes.update([number]))
    with Cut(depths=(depth,)).attach(model):
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (packed.update(inside), tensor)[1], lambda tensor: tensor
        )
        with keep:
            loss = model(**batch(model)).loss
        loss.backward()
        low = int(4 * depth)
        assert {number for number in packed if packed[number]} == set(range(low, 4))
        passes.clear()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**batch(model)).loss.backward()
    assert passes == {number: 2 if number >= low else 1 for number in range(4)}


def test_a_plain_loop_resumes():
    with Cut().attach(adapted(layers=8)) as sift:
        for _ in range(3):
            sift.step()
        state = sift.state_dict()
        wanted = [sift.last.layers, *(sift.step().layers for _ in range(30))]
    with Cut(seed=9).attach(adapted(layers=8)) as again:
        again.load_state_dict(state)
        assert [again.last.layers, *(again.step().layers for _ in range(30))] == wanted


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"depths": ()}, r"^cut\.depths is empty: give at least one share, such as 0$"),
        ({"depths": (0.5, 1)}, r"^cut\.depths holds 1, but each must be from 0 to below 1$"),
        ({"depths": (-0.1,)}, r"^cut\.depths holds -0\.1, but"),
        ({"depths": (float("nan"),)}, r"^cut\.depths holds nan, but"),
        ({"depths": 0.5}, r"^cut\.depths is 0\.5, but must be a list, each a number$"),
        ({"depths": ("deep",)}, r"must be a list, each a number$"),
    ],
)
def test_settings_out_of_range_are_refused(bad, message):
    with pytest.raises(RecipeError, match=message):
        Cut(**bad)
