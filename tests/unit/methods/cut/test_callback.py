"""Cut: which layers train, where backward ends, and steps that make up for the seldom."""

import itertools
from collections import Counter

import pytest
import torch
from support.oracles import summed_loss
from support.seen import assert_same
from support.tiny import batch
from support.trainers import adapted, train, weights

from siftune import Cut
from siftune.engine.groups import group_by_layer
from siftune.errors import RecipeError

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


@pytest.mark.parametrize("hold", [1, 3])
def test_a_cut_is_held_and_then_drawn_without_regard_to_the_last(hold):
    chosen = drawn(1200 * hold, hold=hold)
    spans = [set(chosen[start : start + hold]) for start in range(0, len(chosen), hold)]
    assert all(len(span) == 1 for span in spans)
    lowest = [span.pop()[0] for span in spans]
    again = sum(one == other for one, other in itertools.pairwise(lowest)) / 1199
    assert again == pytest.approx(1 / 4, abs=4 * (3 / 16 / 1199) ** 0.5)


def test_shares_are_of_the_layers_that_have_something_to_train():
    model = adapted(targets=list(LOWEST))
    with Cut(depths=(0.5,)).attach(model) as sift:
        assert sift.last.layers == (3,)
    with Cut(depths=(0.49,)).attach(model) as sift:
        assert sift.last.layers == (1, 3)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_compensated_steps_are_those_of_a_slow_loop(kind):
    """float64; an optimizer for every layer, and the head, whose steps stay as they are."""

    def optimizer_of(parameters):
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)

    def opened():
        model = adapted().double()
        model.get_output_embeddings().weight.requires_grad_()
        return model

    model, oracle = opened(), opened()
    cut = Cut(hold=2, compensate=True, depths=(0.25, 0.25, 0.5, 0.75), seed=2)
    optimizer, chosen = optimizer_of([p for p in model.parameters() if p.requires_grad]), []
    with cut.attach(model, optimizer=optimizer) as sift:
        for step in range(12):
            chosen.append(sift.last.layers)
            for micro in range(2):
                summed_loss(model, batch(model, seed=10 * step + micro)).backward()
            optimizer.step()
            optimizer.zero_grad()
    owners = parameters_of(oracle) | {"head": [oracle.get_output_embeddings().weight]}
    optimizers = {owner: optimizer_of(parameters) for owner, parameters in owners.items()}
    chance = {1: 0.5, 2: 0.75, 3: 1.0, "head": 1.0}
    for step, layers in enumerate(chosen):
        for micro in range(2):
            summed_loss(oracle, batch(oracle, seed=10 * step + micro)).backward()
        for owner in (*layers, "head"):
            before = [p.detach().clone() for p in owners[owner]]
            optimizers[owner].step()
            for parameter, old in zip(owners[owner], before, strict=True):
                parameter.data = parameter.data + (1 / chance[owner] - 1) * (parameter.data - old)
        oracle.zero_grad()
    assert {layers[0] for layers in chosen} == {1, 2, 3}
    for name, value in weights(oracle).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compensate", [False, True])
def test_the_mean_step_of_sgd_is_plain_trainings_or_p_times_it(compensate):
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
        lowest, step = moved(Cut(compensate=compensate, seed=seed))
        steps[lowest] = step
        seed += 1
    for name, plain in moved(None)[1].items():
        mean = torch.stack([step[name] for step in steps.values()]).mean(0)
        p = 1 if compensate else (int(name.split(".layers.")[1].split(".")[0]) + 1) / 4
        torch.testing.assert_close(mean, p * plain, rtol=1e-9, atol=1e-14)


def test_a_step_that_the_scaler_skips_changes_nothing():
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with Cut(compensate=True, depths=(0.5, 0)).attach(model, optimizer=optimizer) as sift:
        for broken in (False, True, False):
            before, choice = weights(model), sift.last
            scaler.scale(model(**batch(model)).loss).backward()
            if broken:
                model.get_parameter(next(n for n in before if ".layers.3." in n)).grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            changed = any(not torch.equal(value, before[name]) for name, value in weights(model).items())
            assert changed is not broken
            assert (sift.last is choice) is broken
        before = weights(model)
        sift.before_update()  # as the Trainer's callback is called, whether the optimizer then steps or not
        sift.after_update()
        assert_same(before, weights(model))


def test_values_from_before_a_step_are_not_kept_beyond_it():
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Cut(compensate=True, seed=1).attach(model, optimizer=optimizer) as sift:
        sift.before_update()
        assert sift._scaled._before
        sift.remove()
        assert sift._scaled is None


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


@pytest.mark.parametrize("stop", [2, 3, 4])  # within a hold, at its end, within the next
def test_resume_within_a_hold_is_bitwise_the_unbroken_run(tmp_path, stop):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": stop, "weight_decay": 0.1}
    runs = []
    for folder in (None, str(tmp_path / f"checkpoint-{stop}")):
        method, chosen = Cut(hold=3, compensate=True, seed=1), []
        method.on_select = chosen.append
        model, _ = train(tmp_path, method, model=adapted(dropout=0.1), resume=folder, **settings)
        runs.append((weights(model), [choice.layers for choice in chosen]))
    (unbroken, wanted), (resumed, chosen) = runs
    assert chosen == wanted[stop:]
    assert len(set(wanted)) > 1
    assert_same(unbroken, resumed)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_plain_loop_resumes_within_a_hold(stop):
    with Cut(hold=3).attach(adapted(layers=8)) as sift:
        for _ in range(stop):
            sift.step()
        state = sift.state_dict()
        wanted = [sift.last.layers, *(sift.step().layers for _ in range(30))]
    with Cut(hold=3, seed=9).attach(adapted(layers=8)) as again:
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
        ({"hold": 0}, r"^cut\.hold is 0, but must be 1 or more$"),
    ],
)
def test_settings_out_of_range_are_refused(bad, message):
    with pytest.raises(RecipeError, match=message):
        Cut(**bad)


def test_compensating_takes_the_optimizer():
    model = adapted()
    with pytest.raises(
        RecipeError, match=r"settings of Cut act around optimizer steps: give attach\(\.\.\., optimizer="
    ):
        Cut(compensate=True).attach(model)
    with Cut(depths=[0]).attach(model) as sift:  # nothing of the refused one is left behind
        assert sift.last.layers == (0, 1, 2, 3)
