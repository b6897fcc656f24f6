"""GREATS on tiny models in plain loops: choices and gradients against single-sample backward passes, in float64."""

import pytest
import torch
from support.adapted import adapted
from support.oracles import flat, gradients, sample_gradients, summed_loss
from support.tiny import batch

from siftune import GREATS
from siftune.base.errors import RecipeError
from siftune.engine.groups import group_by_layer


def double(family="llama", **settings):
    return adapted(family, **settings).double()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def followed(model, inputs, support, select, lr, loss=summed_loss, **settings):
    """The choice in a batch, and the gradients that follow it."""
    model.zero_grad()
    optimizer = torch.optim.SGD(trainable(model), lr=lr)
    method = GREATS(select, **settings)
    with method.attach(model, batches=[support], optimizer=optimizer, loss=summed_loss) as sift:
        loss(model, inputs).backward()
        return sift.last, [p.grad for p in trainable(model)]


def greedy_loop(rows, h, count, step):
    """Sample after sample the one with the highest ⟨h, g⟩ less the overlap with those before; ascending."""
    chosen = []
    for _ in range(count):
        gains = {
            i: float(h @ rows[i]) - step * sum(float(rows[i] @ rows[j]) for j in chosen)
            for i in range(len(rows))
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.get))
    return sorted(chosen)


def support_vector(model, support):
    return torch.cat([grad.flatten() for grad in gradients(model, support).values()])


@pytest.mark.parametrize(("family", "lr"), [("llama", 1.0), ("gpt2", 0.0)])
def test_choice_and_gradient_are_those_of_a_loop_over_samples(family, lr):
    model = double(family)
    inputs, support = batch(model, 6, seed=1), batch(model, 3, seed=2)
    single, h = sample_gradients(model, inputs), support_vector(model, support)
    rows = flat(single, trainable(model))
    chosen = greedy_loop(rows, h, 2, lr * 6 / 2)
    choice, grads = followed(model, inputs, support, 2, lr)
    assert choice.units == ("model",)
    assert choice.selected.tolist() == [chosen]
    torch.testing.assert_close(choice.scores[0], rows @ h, rtol=1e-10, atol=1e-12)
    for parameter, grad in zip(trainable(model), grads, strict=True):
        torch.testing.assert_close(grad, single[parameter][chosen].sum(0) * 6 / 2, rtol=1e-10, atol=1e-12)


def test_the_learning_rate_is_that_of_the_coming_step():
    model = double()
    inputs, support = batch(model, 6, seed=1), batch(model, 3, seed=2)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    method = GREATS(2)
    with method.attach(model, batches=[support], optimizer=optimizer, loss=summed_loss) as sift:
        chosen = []
        for lr in (0.0, 3.0):
            optimizer.param_groups[0]["lr"] = lr
            summed_loss(model, inputs).backward()
            chosen.append(sift.last.selected[0].tolist())
    rows, h = flat(sample_gradients(model, inputs), trainable(model)), support_vector(model, support)
    assert chosen == [greedy_loop(rows, h, 2, lr * 6 / 2) for lr in (0.0, 3.0)]
    assert chosen[0] != chosen[1]


def test_one_pass_over_the_batch_and_one_over_the_support_rows():
    model, passes = double(), []
    layer = group_by_layer(model)[1].module
    layer.register_forward_pre_hook(lambda _, args: passes.append(("forward", len(args[0]))))
    layer.register_full_backward_hook(lambda _, __, grads: passes.append(("backward", len(grads[0]))))
    followed(model, batch(model, 6), batch(model, 3), 2, 1.0)
    assert passes == [("forward", 3), ("backward", 3), ("forward", 6), ("backward", 6)]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_samples_without_labels_stand_back(count):
    model = double()
    inputs, support = batch(model, 6, seed=1), batch(model, 3, seed=2)
    inputs["labels"][[0, 2, 5]] = -100
    single = sample_gradients(model, inputs)
    live, h = [1, 3, 4], support_vector(model, support)
    order = greedy_loop(flat(single, trainable(model))[live], h, min(count, 3), 6 / count)
    chosen = [live[place] for place in order]
    choice, grads = followed(model, inputs, support, count, 1.0)
    assert [i for i in choice.selected[0].tolist() if i in live] == chosen
    assert choice.selected.shape == (1, count)
    for parameter, grad in zip(trainable(model), grads, strict=True):
        wanted = single[parameter][chosen].sum(0) * 3 / len(chosen)  # of as many samples as have labels
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_activation_checkpointing_changes_nothing(kind):
    model = double(kind=kind)
    inputs, support = batch(model, 6, seed=1), batch(model, 3, seed=2)
    plain, plain_grads = followed(model, inputs, support, 2, 1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    choice, grads = followed(model, inputs, support, 2, 1.0)
    assert torch.equal(choice.selected, plain.selected)
    torch.testing.assert_close(choice.scores, plain.scores, rtol=1e-10, atol=1e-12)
    for grad, wanted in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


def of_one_row(model, inputs, value):
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    return logits[:1].square().mean() * value + logits[1:].square().mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("spoil", [lambda *args: summed_loss(*args[:2]) * args[2], of_one_row], ids=["all", "one"])
def test_a_loss_that_is_not_finite_shows_in_the_gradients(value, spoil):
    """Nothing is left out in silence: GradScaler and the Trainer look at the gradients."""
    model = double()
    _, grads = followed(model, batch(model, 4), batch(model, 2), 2, 1.0, loss=lambda *args: spoil(*args, value))
    assert all(grad.isnan().any() for grad in grads)


def test_a_loop_gives_rows_and_optimizer():
    model = double()
    with pytest.raises(RecipeError, match="batches"):
        GREATS().attach(model)
    with pytest.raises(RecipeError, match="optimizer"):
        GREATS().attach(model, batches=[batch(model)])
