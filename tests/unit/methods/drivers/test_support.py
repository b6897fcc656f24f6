"""The support set's gradient against autograd."""

import random

import pytest
import torch
from support.oracles import summed_loss
from support.tiny import batch
from support.trainers import adapted
from torch import nn

from siftune.methods.drivers.support import Support, support_gradient
from siftune.models.loss import model_loss

CLOSE = {"rtol": 1e-10, "atol": 1e-13}


def tiny_model(**settings):
    return adapted(layers=2, **settings).double()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def labels(inputs):
    return int((inputs["labels"][:, 1:] != -100).sum())


def assert_same(got, expected, **close):
    assert got.keys() == expected.keys()
    for parameter, grad in expected.items():
        assert got[parameter].shape == parameter.shape
        assert got[parameter].dtype == parameter.dtype
        torch.testing.assert_close(got[parameter], grad, **(close or CLOSE))


@pytest.mark.parametrize("rows", [[3], [2, 1], [1, 3, 2]])
def test_gradient_of_the_mean_over_all_labels(rows):
    model = tiny_model()
    batches = [batch(model, count, length=5 + 3 * place, seed=place) for place, count in enumerate(rows)]
    assert len(rows) == 1 or len({labels(inputs) for inputs in batches}) > 1
    total = sum(summed_loss(model, inputs, 1) for inputs in batches) / sum(labels(inputs) for inputs in batches)
    expected = dict(zip(trainable(model), torch.autograd.grad(total, trainable(model)), strict=True))
    assert max(float(grad.abs().max()) for grad in expected.values()) > 1e-3
    assert_same(support_gradient(model, batches, summed_loss, trainable(model), 0), expected)
    # transformers' own loss is formed in float32
    assert_same(support_gradient(model, batches, model_loss, trainable(model), 0), expected, rtol=1e-4, atol=1e-7)


def test_a_batch_without_labels_counts_for_nothing():
    model = tiny_model()
    full, empty = batch(model, 2), batch(model, 2, seed=1)
    empty["labels"] = torch.full_like(empty["labels"], -100)  # its mean loss is no number
    expected = support_gradient(model, [full], model_loss, trainable(model), 0)
    for batches in ([full, empty], [empty, full]):
        assert_same(support_gradient(model, batches, model_loss, trainable(model), 0), expected)
    assert support_gradient(model, [empty], model_loss, trainable(model), 0) == {}


def test_half_precision_gradients_do_not_vanish_on_the_way():
    """2^-20 is a float16 number, but on its way there the gradient is 2^-30, which is none."""
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float16))

    def loss(_, inputs):
        return ((weight * 2.0**10).float() * 2.0**-30 * inputs["x"]).sum()

    got = support_gradient(nn.Identity(), [{"x": torch.ones(1)}], loss, [weight], 0)
    assert got[weight].dtype == torch.float16
    assert got[weight].item() == 2.0**-20


def test_what_stays_as_it_was():
    model = tiny_model()
    parameters = trainable(model)
    for place, parameter in enumerate(parameters):
        parameter.grad = None if place % 2 else torch.full_like(parameter, 7.0)
    model.train()
    torch.manual_seed(11)
    grads, values = [p.grad for p in parameters], [p.detach().clone() for p in parameters]
    flags, state, python = [p.requires_grad for p in model.parameters()], torch.get_rng_state(), random.getstate()
    support_gradient(model, [batch(model)], model_loss, parameters, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training
    assert all(p.grad is grad for p, grad in zip(parameters, grads, strict=True))
    assert all(bool((grad == 7.0).all()) for grad in grads if grad is not None)
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))


def test_the_global_generator_is_put_back_after_an_error():
    def loss(*_):
        torch.rand(3)
        raise RuntimeError("no loss")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no loss"):
        support_gradient(nn.Identity(), [{"x": torch.ones(1)}], loss, [nn.Parameter(torch.ones(1))], 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_drawn_from_the_seed_alone():
    model = tiny_model(dropout=0.5).train()
    inputs = [batch(model), batch(model, seed=1)]

    def once(seed, state):
        torch.manual_seed(state)
        return support_gradient(model, inputs, model_loss, trainable(model), seed)

    first, same, other = once(3, 0), once(3, 1), once(4, 0)
    assert all(torch.equal(first[p], same[p]) for p in first)
    assert not all(torch.equal(first[p], other[p]) for p in first)
    beyond = once(2**65 + 3, 0)  # more bits than torch takes
    assert all(torch.equal(first[p], beyond[p]) for p in first)
    model.eval()
    assert_same(once(3, 0), once(4, 0))


def test_batches_do_not_share_a_dropout_mask():
    model = tiny_model(dropout=0.5).train()
    inputs = batch(model)
    once = support_gradient(model, [inputs], model_loss, trainable(model), 0)
    twice = support_gradient(model, [inputs, inputs], model_loss, trainable(model), 0)
    assert not all(torch.allclose(once[p], twice[p]) for p in once)


def test_unused_parameters_are_left_out():
    model = tiny_model()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    got = support_gradient(model, [batch(model)], model_loss, [*trainable(model)[:3], unused], 0)
    assert list(got) == trainable(model)[:3]


def test_gradients_are_on_where_they_were_off():
    model = tiny_model()
    inputs = [batch(model)]
    expected = support_gradient(model, inputs, model_loss, trainable(model), 0)
    with torch.no_grad():
        assert_same(support_gradient(model, inputs, model_loss, trainable(model), 0), expected)
        assert not torch.is_grad_enabled()


def test_a_mean_never_takes_in_nan():
    weight = nn.Parameter(torch.zeros(2))
    support = Support(4, every=2)
    support.begin(0, lambda: {weight: torch.tensor([torch.nan, 0.0])})
    support.end()
    assert support.gradients[weight].isnan().any()  # the fault is seen where there is nothing else
    assert support.average == {}
    for step, value in ((2, 1.0), (4, torch.inf)):
        support.begin(step, lambda value=value: {weight: torch.full((2,), value)})
        support.end()
        assert support.average[weight].tolist() == support.gradients[weight].tolist() == [1.0, 1.0]
