"""What a row can do to a step's gradient, and the noise that hides it."""

import math

import pytest
import torch
from support.adapted import ADAPTED, adapted, shake
from support.oracles import row_of, summed_loss
from support.tiny import VOCAB, batch, tiny
from torch import nn

from siftune.base.errors import UnsupportedError
from siftune.engine.gate import LayerGates
from siftune.engine.groups import group_by_layer
from siftune.methods.dp.accounting import Mechanism
from siftune.methods.dp.driver import PrivateGradients, finite_sum
from siftune.methods.dp.secret import Secret
from siftune.models.adapters.attach import attach_adapter
from siftune.models.adapters.full import OpenLayers
from siftune.models.loss import label_positions, row_losses

ROWS, CLIP = 5, 0.3


def opened(layers=None):
    """A model whose layers train themselves, norms among them."""
    model = tiny("llama")
    OpenLayers(model, layers, originals=False)
    return model


MODELS = {
    "lora": ADAPTED["lora"],
    "lora gpt2": ADAPTED["lora gpt2"],
    "dora": ADAPTED["dora"],
    "ia3": ADAPTED["ia3"],
    "parallel": ADAPTED["parallel on both, opt"],
    "whole layers": opened,
}
every_case = pytest.mark.parametrize("kind", MODELS)


def mechanism(clip=CLIP, noise=0.0, batch=4):
    return Mechanism(epsilon=8, delta=1e-5, clip=clip, rows=100, batch=batch, steps=10, noise=noise)


def weighted_loss(model, inputs, weights):
    """The sum over rows with a weight for each, so that a row's gradient can be as large as one likes."""
    labels = inputs["labels"]
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    if set(weights) == {1.0}:
        return finite_sum(row_losses(logits[label_positions(labels)][None], labels))
    single = row_losses(logits[label_positions(labels)][None], labels)
    return sum(weight * loss for weight, loss in zip(weights, single, strict=True))


def taken(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return grads


def clipped(model, batches, weights=None, **settings):
    """Sum of the clipped gradients over some micro-batches, before any noise."""
    driver = PrivateGradients(model, mechanism(**settings), Secret(0))
    try:
        for number, inputs in enumerate(batches):
            given = weights[number] if weights else [1.0] * len(inputs["labels"])
            weighted_loss(model, inputs, given).backward()
    finally:
        driver.remove()
    return taken(model)


def by_loop(model, inputs, active=None, clip=CLIP):
    """The slow way: a backward pass for every row, clipped by itself, added up."""
    groups = [g for g in group_by_layer(model) if active is None or g.index in active]
    names = {p: n for n, p in model.named_parameters()}
    totals = {names[p]: torch.zeros_like(p) for group in groups for p in group.parameters.values()}
    for row in range(len(inputs["labels"])):
        model.zero_grad()
        summed_loss(model, row_of(inputs, row)).backward()
        parameters = [p for group in groups for p in group.parameters.values()]
        grads = {p: torch.zeros_like(p) if p.grad is None else p.grad for p in parameters}
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        for parameter, grad in grads.items():
            totals[names[parameter]] += grad * min(1.0, clip / norm)
    model.zero_grad()
    return totals


def distance(one, other):
    """Norm of the difference of two gradients."""
    zero = torch.zeros((), dtype=torch.float64)
    return math.sqrt(
        sum(float((one.get(n, zero) - other.get(n, zero)).square().sum()) for n in one.keys() | other.keys())
    )


def assert_close(ours, theirs):
    for name, value in theirs.items():
        torch.testing.assert_close(ours.get(name, torch.zeros_like(value)), value, rtol=1e-9, atol=1e-11)


@every_case
def test_it_is_the_loop_over_rows(kind):
    model = MODELS[kind]().double()
    inputs = batch(model, ROWS)
    wanted = by_loop(model, inputs)
    assert_close(clipped(model, [inputs]), wanted)
    plain = by_loop(model, inputs, clip=1e9)
    assert distance(wanted, plain) > 0.01, "nothing was clipped"
    assert_close(clipped(model, [inputs], clip=1e9), plain)
    pieces = [{name: value[at : at + 2] for name, value in inputs.items()} for at in range(0, ROWS, 2)]
    assert_close(clipped(model, pieces), wanted)


@every_case
def test_no_row_has_more_influence_than_the_norm(kind):
    """One row less, or an adversary's in the place of another: his gradient is as large as he likes."""
    model = MODELS[kind]().double()
    inputs, others = batch(model, ROWS), batch(model, ROWS, seed=1)
    rest = {name: value[:-1] for name, value in inputs.items()}
    fake = {name: torch.cat([value[:-1], others[name][-1:]]) for name, value in inputs.items()}
    without = clipped(model, [rest])
    for factor in (1.0, 1e8, 1e-8):
        weights = [[1.0] * (ROWS - 1) + [factor]]
        with_row, with_fake = (clipped(model, [b], weights) for b in (inputs, fake))
        assert distance(with_row, without) <= CLIP * (1 + 1e-9)
        assert distance(with_fake, without) <= CLIP * (1 + 1e-9)
        assert distance(with_fake, with_row) <= 2 * CLIP * (1 + 1e-9)
        if factor == 1e8:  # the bound is reached: not less is promised than is spent
            assert distance(with_row, without) == pytest.approx(CLIP)


@every_case
@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e200, "weight"])
def test_a_row_that_is_not_finite_counts_nothing(kind, broken):
    """The sum is that of the other rows, one by one, and none of them has more than the norm."""
    model = MODELS[kind]().double()
    inputs = batch(model, ROWS)
    inputs["input_ids"][:-1].clamp_(max=VOCAB - 2)
    inputs["input_ids"][-1, :2] = VOCAB - 1
    rest = {name: value[:-1] for name, value in inputs.items()}
    wanted = by_loop(model, rest)
    weights = None
    if broken == "weight":  # a finite loss, without a finite gradient
        weights = [[1.0] * (ROWS - 1) + [math.inf]]
    else:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # not the embeddings'
        with torch.no_grad():
            embeddings.weight[VOCAB - 1] = broken
    assert_close(clipped(model, [inputs], weights), wanted)


@every_case
def test_what_a_row_adds_depends_on_no_other_row(kind):
    """Rows of other lengths beside it change padding and the number of tokens."""
    model = MODELS[kind]().double()
    inputs, longer = batch(model, ROWS), batch(model, 1, length=12, seed=2)
    padded = {name: nn.functional.pad(v, (0, 5), value=-100 if name == "labels" else 0) for name, v in inputs.items()}
    both = {name: torch.cat([padded[name], longer[name]]) for name in inputs}
    for clip in (CLIP, 1e9):
        alone, other, together = (clipped(model, [b], clip=clip) for b in (inputs, longer, both))
        assert_close(together, {name: alone[name] + other[name] for name in alone})


def test_layers_that_do_not_train_have_neither_gradient_nor_noise():
    """The others have all of C for themselves."""
    model = adapted().double()
    inputs, groups = batch(model, ROWS), group_by_layer(model)
    wanted = by_loop(model, inputs, active=(1, 3))
    with LayerGates(model, groups) as gates:
        gates.set_active((1, 3))
        driver = PrivateGradients(model, mechanism(noise=1.0), Secret(0))
        weighted_loss(model, inputs, [1.0] * ROWS).backward()
        assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
        driver.release(0)
        for group in groups:
            assert all((p.grad is None) == (group.index in (0, 2)) for p in group.parameters.values())
        driver.remove()
        model.zero_grad()
        weights = [[1.0] * (ROWS - 1) + [1e8]]
        rest = {name: value[:-1] for name, value in inputs.items()}
        far = distance(clipped(model, [inputs], weights), clipped(model, [rest]))
        assert far == pytest.approx(CLIP)


def released(model, driver, steps, inputs=None):
    """(steps, values): what the optimizer would see, step by step."""
    found = []
    for step in range(steps):
        if inputs is not None:
            weighted_loss(model, inputs, [1.0] * len(inputs["labels"])).backward()
        driver.release(step)
        found.append(torch.cat([grad.flatten() for grad in taken(model).values()]))
    return torch.stack(found)


def test_a_step_without_rows_is_noise_of_the_stated_scale():
    """σ C / b on every value of every parameter; independent between values and steps."""
    model, steps = adapted(), 200
    drawn = released(model, PrivateGradients(model, mechanism(noise=1.7, batch=8), Secret(3)), steps)
    std, values = 1.7 * CLIP / 8, drawn.shape[1]
    assert values == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert float(drawn.std()) == pytest.approx(std, rel=0.01)
    assert float((drawn.std(0) - std).abs().max()) < 5.5 * std / math.sqrt(2 * steps), "a parameter has another scale"
    assert float(drawn.mean().abs()) < 4 * std / math.sqrt(drawn.numel())
    assert float(drawn.mean(0).abs().max()) < 5.5 * std / math.sqrt(steps)
    some = torch.randperm(values, generator=torch.Generator().manual_seed(0))[:200]
    between = torch.corrcoef(drawn[:, some].T)[~torch.eye(200, dtype=torch.bool)]
    assert float(between.abs().max()) < 6 / math.sqrt(steps), "two values share their noise"
    steps_apart = torch.corrcoef(drawn[:50])[~torch.eye(50, dtype=torch.bool)]
    assert float(steps_apart.abs().max()) < 6 / math.sqrt(values), "two steps share their noise"


def test_the_mean_over_draws_is_the_clipped_sum_over_the_expected_rows():
    """Not over the rows that there are: their number is private too."""
    model, draws = adapted().double(), 100
    inputs = batch(model, ROWS)
    wanted = torch.cat([grad.flatten() for grad in clipped(model, [inputs]).values()]) / 8
    drawn = released(model, PrivateGradients(model, mechanism(noise=0.5, batch=8), Secret(1)), draws, inputs)
    error = 0.5 * CLIP / 8 / math.sqrt(draws)
    assert float(((drawn.mean(0) - wanted) / error).abs().max()) < 5.5
    assert float(((drawn.mean(0) - wanted) / error).std()) == pytest.approx(1, abs=0.1)


def test_noise_comes_from_the_secret_alone():
    models = [adapted() for _ in range(3)]
    one, again, other = (
        released(model, PrivateGradients(model, mechanism(noise=1.0), secret), 2)
        for model, secret in zip(models, (Secret(0), Secret(0), Secret()), strict=True)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_evaluation_is_left_alone_and_removing_ends_it():
    model = adapted().double()
    inputs = batch(model, ROWS)
    modules = [(set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with torch.no_grad():
        logits = model(**inputs).logits
    weighted_loss(model, inputs, [1.0] * ROWS).backward()
    plain = taken(model)
    driver = PrivateGradients(model, mechanism(), Secret(0))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    driver.remove()
    driver.remove()
    assert [(set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == modules
    weighted_loss(model, inputs, [1.0] * ROWS).backward()
    assert_close(taken(model), plain)


def on_embeddings():
    return shake(attach_adapter(tiny("llama"), targets=["q_proj", "embed_tokens"]))


def with_head():
    model = adapted()
    model.get_output_embeddings().weight.requires_grad_()
    return model


REFUSED = {
    "an adapter on embeddings": (on_embeddings, "embed_tokens"),
    "a head": (with_head, "lm_head"),
    "half precision": (lambda: adapted().bfloat16(), "bfloat16"),
    "experts": (ADAPTED["lora on experts"], "experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_clipped_is_refused(case):
    build, sentence = REFUSED[case]
    with pytest.raises(UnsupportedError, match=sentence):
        PrivateGradients(build(), mechanism(), Secret(0))


# the loss: of every row by itself


def private_losses(model, inputs):
    labels = inputs["labels"]
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return row_losses(logits[label_positions(labels)][None], labels)


def test_losses_are_those_of_single_rows():
    model = tiny("llama").double()
    inputs = batch(model, 4)
    single = [summed_loss(model, row_of(inputs, row)) for row in range(4)]  # a mean over the row's own tokens
    torch.testing.assert_close(private_losses(model, inputs), torch.stack(single), rtol=1e-12, atol=0)
    assert len({int((row > -1).sum()) for row in inputs["labels"]}) > 1, (
        "rows have as many labels each: nothing is shown"
    )


def test_a_row_without_labels_adds_nothing():
    model = tiny("llama").double()
    inputs = batch(model, 3)
    without = {name: value[:2] for name, value in inputs.items()}
    inputs["labels"][2] = -100
    losses = private_losses(model, inputs)
    torch.testing.assert_close(losses[:2], private_losses(model, without), rtol=1e-12, atol=0)
    assert losses[2] == 0


def test_a_loss_that_is_not_finite_has_no_gradient():
    """A label whose logit is −∞: the loss is infinite, but its gradient is finite."""
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    with torch.no_grad():
        logits[0, 1, 2] = -math.inf
    losses = row_losses(logits, labels)
    assert losses.isfinite().tolist() == [False, True]
    total = finite_sum(losses)
    assert total == losses[1]
    total.backward()
    assert logits.grad[0].abs().sum(1).gt(0).tolist() == [False, False, True]
