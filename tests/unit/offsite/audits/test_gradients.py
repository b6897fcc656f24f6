import copy
import math

import pytest
import torch
from support.oracles import gradients, row_of
from support.tiny import batch, tiny

from siftune.base.errors import LayerError
from siftune.offsite.audits.gradients import (
    OuterGradient,
    cosine,
    gradient_cosine,
    outer_gradient,
    outer_parameters,
)
from siftune.offsite.emulator.model import Split

SPLIT = Split(1, 2)


def base(family="llama", layers=5):
    """In float64, except for the loss itself, which is float32."""
    return tiny(family, layers).double()


def emulator_of(model, seed=0):
    """The same model with other weights in its middle."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    outer = {id(p) for p in outer_parameters(other, SPLIT).values()}
    for p in other.parameters():
        if id(p) not in outer:
            p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return other


def row_by_row(model, batches):
    """Gradient of the summed loss, one backward pass per row, by parameter of the outer layers."""
    parameters = outer_parameters(model, SPLIT)
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for inputs in batches:
        for i in range(len(inputs["input_ids"])):
            found = gradients(model, row_of(inputs, i), divisor=1)
            for name, p in parameters.items():
                sums[name] += found[p]
    return sums


def flat(tensors, prefix=""):
    return torch.cat([t.flatten().double() for name, t in tensors.items() if name.startswith(prefix)])


def cos(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_equals_one_pass_per_row(family):
    model = base(family)
    emulator = emulator_of(model)
    batches = [batch(model, 3, 8, seed) for seed in range(2)]
    full, small = (row_by_row(one, batches) for one in (model, emulator))
    for one, wanted in ((model, full), (emulator, small)):
        found = outer_gradient(one, batches, SPLIT)
        assert list(found.tensors) == list(wanted)
        scale = flat(wanted).abs().max().item()
        for name, tensor in found.tensors.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-4, atol=1e-5 * scale)
    found = gradient_cosine(model, emulator, batches, SPLIT)
    assert found.layers == ["first.0", "last.0", "last.1"]
    layers = [f"{layer}." for layer in found.layers]
    assert found.per_layer == pytest.approx([cos(flat(full, p), flat(small, p)) for p in layers], abs=1e-5)
    assert found.overall == pytest.approx(cos(flat(full), flat(small)), abs=1e-5)
    assert max(found.per_layer) < 0.999


def test_the_loss_is_the_mean_over_label_tokens():
    model = base()
    batches = [batch(model, 3, 8, seed) for seed in range(2)]
    emulator = emulator_of(model)
    found = gradient_cosine(model, emulator, batches, SPLIT)
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for one, loss in ((model, found.loss_full), (emulator, found.loss_emulator)):
        with torch.no_grad():
            total = sum(one(**b).loss.item() * int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        assert loss == pytest.approx(total / tokens, rel=1e-5)
    assert outer_gradient(model, batches, SPLIT).tokens == tokens


def test_batches_and_padding_do_not_matter():
    model = base()
    inputs = batch(model, 4, 9)
    whole = outer_gradient(model, [inputs], SPLIT)
    padded = {
        name: torch.nn.functional.pad(t, (0, 3), value=-100 if name == "labels" else 0) for name, t in inputs.items()
    }
    empty = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    split = [row_of(padded, i) for i in range(4)]
    found = outer_gradient(model, iter([*split, empty]), SPLIT)
    assert (found.tokens, found.loss) == (whole.tokens, pytest.approx(whole.loss, rel=1e-5))
    scale = flat(whole.tensors).abs().max().item()
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name], rtol=1e-4, atol=1e-5 * scale)


def test_the_middle_may_have_another_depth():
    model = base()
    shorter = copy.deepcopy(model)
    del shorter.model.layers[2]
    shorter.config.num_hidden_layers = 4
    found = gradient_cosine(model, shorter, [batch(model)], SPLIT)
    assert len(found.per_layer) == 3
    assert found.overall < 0.999


def test_half_precision_is_added_up_in_float32():
    model = tiny("llama", 4).bfloat16()
    batches = [batch(model, 2, 5, seed) for seed in range(3)]
    found = outer_gradient(model, batches, SPLIT).tensors
    single = [outer_gradient(model, [b], SPLIT).tensors for b in batches]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(one[name] for one in single), rtol=1e-6, atol=1e-7)


def test_leaves_no_trace_also_after_an_error():
    model = base().train()
    parameters = list(model.parameters())
    for i, p in enumerate(parameters):
        p.requires_grad_(i % 3 == 0)
    model.model.layers[0].eval()
    state = [p.requires_grad for p in parameters], [m.training for m in model.modules()]
    before = [p.detach().clone() for p in parameters]
    outer_gradient(model, [batch(model)], SPLIT)
    bad = {**batch(model), "input_ids": torch.full((3, 7), 10**6)}
    with pytest.raises(IndexError):
        outer_gradient(model, [bad], SPLIT)
    assert ([p.requires_grad for p in parameters], [m.training for m in model.modules()]) == state
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_dropout_is_off():
    model = tiny("gpt2", 4, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    inputs = [batch(model)]
    assert outer_gradient(model, inputs, SPLIT).loss == outer_gradient(model, inputs, SPLIT).loss


def gradient(**tensors):
    return OuterGradient({name.replace("_", "."): torch.tensor(t) for name, t in tensors.items()}, 1.0, 1)


def test_cosine_of_known_gradients():
    a = gradient(first_0_w=[3.0, 0.0], first_0_b=[4.0], last_0_w=[1.0])
    b = gradient(first_0_w=[3.0, 5.0], first_0_b=[4.0], last_0_w=[-2.0])
    found = cosine(a, b)
    assert found.layers == ["first.0", "last.0"]
    assert found.per_layer == pytest.approx([25 / (5 * math.sqrt(50)), -1])
    assert found.overall == pytest.approx((25 - 2) / math.sqrt(26 * 54))


def test_layers_beyond_the_tenth_are_told_apart():
    a = gradient(first_1_w=[1.0], first_10_w=[1.0])
    b = gradient(first_1_w=[1.0], first_10_w=[-1.0])
    assert cosine(a, b).per_layer == [1, -1]


def test_a_gradient_of_zero_has_no_cosine():
    found = cosine(gradient(first_0_w=[0.0], last_0_w=[1.0]), gradient(first_0_w=[1.0], last_0_w=[1.0]))
    assert math.isnan(found.per_layer[0])
    assert found.per_layer[1] == 1
    assert found.overall == pytest.approx(1 / math.sqrt(2))


def test_small_gradients_do_not_underflow():
    a = gradient(first_0_w=[1e-30, 1e-30])
    assert cosine(a, a).overall == pytest.approx(1)


@pytest.mark.parametrize("other", [gradient(first_0_v=[1.0]), gradient(first_0_w=[1.0, 2.0]), gradient()])
def test_other_outer_layers_are_refused(other):
    with pytest.raises(ValueError, match="different layers"):
        cosine(gradient(first_0_w=[1.0]), other)


def test_nothing_to_learn_is_refused():
    model = base()
    inputs = batch(model)
    with pytest.raises(ValueError, match="no batch has a label"):
        outer_gradient(model, [{**inputs, "labels": torch.full_like(inputs["labels"], -100)}], SPLIT)
    with pytest.raises(LayerError, match="no middle"):
        outer_gradient(model, [inputs], Split(3, 2))
