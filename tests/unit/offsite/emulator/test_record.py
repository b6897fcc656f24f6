"""The pass over calibration rows, against hooks on an ordinary backward pass."""

import pytest
import torch
from support.emulators import FAMILIES, base, calibration, seen_by
from torch import nn

from siftune.base.errors import DataError
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator.model import Base, Split
from siftune.offsite.emulator.record import record


def seen_by_hooks(model, batches, number, path):
    """Inputs and output gradients of one matrix at real tokens, one batch after the other."""
    xs, gs = [], []
    module = find_layers(model).layers[number].get_submodule(path)

    def keep(_, args, output):
        xs.append(args[0].detach().reshape(-1, args[0].shape[-1]))
        output.register_hook(lambda grad: gs.append(grad.reshape(-1, grad.shape[-1])))

    handle = module.register_forward_hook(keep)
    for inputs in batches:
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["labels"][:, 1:].flatten()
        nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), labels, reduction="sum").backward()
    handle.remove()
    real = [inputs["attention_mask"].bool().flatten() for inputs in batches]
    pairs = [(x[r], g[r]) for x, g, r in zip(xs, gs, real, strict=True)]
    return torch.cat([x for x, _ in pairs]), torch.cat([g for _, g in pairs])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_alone_sees_what_it_saw_in_the_model(family):
    model = base(family)
    batches = calibration(model)
    recording = record(Base(model, Split(1, 1)), batches)
    paths = family_of(model.config).matrices
    for number in (1, 3):
        found = seen_by(Base(model, Split(1, 1)), recording, number, paths)
        for path in paths:
            x, g = seen_by_hooks(model, batches, number, path)
            torch.testing.assert_close(found[path].x_NI, x.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[path].g_NO, g.float(), rtol=1e-4, atol=1e-6)


def test_matrices_that_read_one_tensor_share_it():
    model = base()
    recording = record(Base(model, Split(1, 1)), calibration(model))
    found = seen_by(Base(model, Split(1, 1)), recording, 1, family_of(model.config).matrices)
    assert found["self_attn.q_proj"].x_NI is found["self_attn.v_proj"].x_NI
    assert found["mlp.gate_proj"].x_NI is found["mlp.up_proj"].x_NI
    assert found["self_attn.q_proj"].x_NI is not found["mlp.up_proj"].x_NI


def test_loss_is_the_mean_over_labels():
    model = base()
    batches = calibration(model)
    recording = record(Base(model, Split(1, 1)), batches)
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(
                model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1].flatten(0, 1),
                b["labels"][:, 1:].flatten(),
                reduction="sum",
            )
            for b in batches
        ]
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    assert recording.tokens == count
    assert recording.loss == pytest.approx(float(sum(losses)) / count)


def test_a_model_that_goes_on_in_place_does_not_change_what_was_kept():
    model = base()
    batches = calibration(model)
    untouched = record(Base(model, Split(1, 1)), batches)

    def go_on(_, args, __):
        args[0].data.zero_()

    with find_layers(model).layers[2].register_forward_hook(go_on):
        touched = record(Base(model, Split(1, 1)), batches)
    for before, after in zip(untouched.hidden.get(2), touched.hidden.get(2), strict=True):
        assert torch.equal(before, after)


def test_the_model_is_left_as_it_was():
    model = base().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    record(Base(model, Split(1, 1)), calibration(model))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is None
    assert model.training
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_dropout_is_off():
    model = base().train()
    wanted = record(Base(model, Split(1, 1)), calibration(model)).loss
    for layer in find_layers(model).layers:
        layer.self_attn.attention_dropout = 0.5
    assert record(Base(model, Split(1, 1)), calibration(model)).loss == wanted


def test_rows_without_labels_are_refused():
    model = base()
    batches = calibration(model)
    for inputs in batches:
        inputs["labels"].fill_(-100)
    with pytest.raises(DataError, match="no token to learn"):
        record(Base(model, Split(1, 1)), batches)


def test_a_batch_without_labels_among_others_changes_nothing():
    model = base()
    batches = calibration(model)
    silent = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    one, two = record(Base(model, Split(1, 1)), batches), record(Base(model, Split(1, 1)), [silent, *batches])
    assert one.loss == two.loss
    assert all(torch.equal(*pair) for pair in zip(one.hidden.get(3), two.hidden.get(3), strict=True))


def test_a_loss_that_is_not_finite_is_refused():
    model = base()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="loss on the calibration rows is nan"):
        record(Base(model, Split(1, 1)), calibration(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_see_the_same_in_whatever_order_they_are_replayed(family):
    model = base(family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    batches, paths = calibration(model), family_of(model.config).matrices
    whole = Base(model, Split(1, 1))
    down, up = (record(whole, batches) for _ in range(2))
    assert [up.grads.has(number) for number in range(1, 4)] == [False, False, True]
    upwards = {number: seen_by(whole, up, number, paths) for number in (1, 2, 3)}
    for number in (3, 2, 1):
        one, other = seen_by(whole, down, number, paths), upwards[number]
        for path in paths:
            assert torch.equal(one[path].x_NI, other[path].x_NI)
            assert torch.equal(one[path].g_NO, other[path].g_NO)
    assert not up.grads.has(0)
