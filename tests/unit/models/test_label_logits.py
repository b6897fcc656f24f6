"""Logits at labels alone, while the model computes its own loss: the same loss and gradients for every family."""

import pytest
import torch
from support.tiny import FAMILIES, batch, tiny
from support.trainers import adapted

from siftune.base.errors import LayerError
from siftune.models.label_logits import LabelHead
from siftune.models.loss import find_output_embeddings, label_positions

AGAIN = ["mamba"]


class Sizes:
    """Notes the shapes of what the head is given."""

    def __init__(self, model):
        self.seen = []
        find_output_embeddings(model).register_forward_hook(lambda _, args, __: self.seen.append(tuple(args[0].shape)))


def result(model, inputs, **others):
    """Loss and gradients of a pass in training mode."""
    model.zero_grad()
    loss = model.train()(**inputs, **others).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def built(family, **settings):
    model = tiny(family, layers=2, **settings)
    if family in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # the others have no float64
    return model.double()


@pytest.mark.parametrize("family", [*FAMILIES, *AGAIN])
def test_loss_and_gradients_are_the_models_own(family):
    model, inputs = built(family), batch(tiny(family))
    tolerance = {"rtol": 1e-5, "atol": 1e-7}  # the model's loss is float32
    count = int(label_positions(inputs["labels"]).sum())
    for others in ({}, {"num_items_in_batch": 50}):
        theirs = result(model, inputs, **others)
        with LabelHead(model):
            sizes = Sizes(model)
            assert_same(result(model, inputs, **others), theirs, **tolerance)
            assert sizes.seen[-1] == (1, count + 1, 32)
    assert count + 1 < inputs["labels"].numel()


def test_an_auxiliary_loss_stays_in_it():
    """The loss of a mixture's router is no matter of labels: what is saved is saved there, too."""
    model, inputs = built("mixtral", output_router_logits=True, router_aux_loss_coef=1.0), batch(tiny("mixtral"))
    theirs = result(model, inputs)
    assert abs(theirs[0] - result(built("mixtral"), inputs)[0]) > 0.1
    with LabelHead(model):
        assert_same(result(model, inputs), theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    model, inputs = adapted().double(), batch(tiny("llama"))
    theirs = result(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with LabelHead(model):
        assert_same(result(model, inputs), theirs, rtol=1e-5, atol=1e-7)


def test_a_batch_without_a_label_is_left_alone():
    model, inputs = built("llama"), batch(tiny("llama"))
    without = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    theirs = result(model, inputs)
    with LabelHead(model):
        assert float(model.train()(**without, num_items_in_batch=7).loss) == 0
        assert_same(result(model, inputs), theirs, rtol=1e-5, atol=1e-7)
        assert float(model.train()(**without, num_items_in_batch=7).loss) == 0


def test_evaluation_and_calls_without_labels_see_all_logits():
    model, inputs = tiny("llama", layers=2), batch(tiny("llama"))
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        wanted = model(**inputs)
        with LabelHead(model):
            found = model.eval()(**inputs)
            assert torch.equal(found.logits, wanted.logits)
            assert torch.equal(found.loss, wanted.loss)
            assert torch.equal(model.train()(**plain).logits, wanted.logits)


def test_another_loss_is_reported_once_and_not_changed(caplog):
    model, inputs = built("llama"), batch(tiny("llama"))
    inner = model.loss_function

    def smoothed(logits, labels, vocab_size, **kwargs):
        return inner(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs) + logits.square().mean()

    model.loss_function = smoothed
    theirs = result(model, inputs)
    with LabelHead(model):
        for _ in range(2):
            assert_same(result(model, inputs), theirs, rtol=0, atol=0)
    assert caplog.text.count("logits are computed at all positions: the loss of LlamaForCausalLM is") == 1


def test_a_head_that_is_not_called_as_a_module_is_reported_and_not_changed(caplog):
    model, inputs = built("llama"), batch(tiny("llama"))
    theirs = result(model, inputs)
    head, model.lm_head.forward = model.lm_head, None

    class Plain:
        def __call__(self, hidden):
            return hidden @ head.weight.T

    model.__dict__["lm_head"] = Plain()  # before the module of that name
    model.get_output_embeddings = lambda: head
    with LabelHead(model):
        assert_same(result(model, inputs), theirs, rtol=1e-6, atol=1e-9)
    assert caplog.text.count("logits are computed at all positions: Expected input batch_size") == 1


def test_a_head_that_is_called_otherwise_later_is_refused():
    model, inputs = built("llama"), batch(tiny("llama"))
    with LabelHead(model):
        result(model, inputs)
        model.loss_function = lambda **_: model.lm_head(torch.zeros(3, 7, 32).double()).sum()
        with pytest.raises(LayerError, match="called its head 2 times in a forward pass, where once is supported"):
            model(**inputs)


def test_a_pass_that_fails_leaves_the_next_one_complete():
    model, inputs = built("llama"), batch(tiny("llama"))
    wanted = model.eval()(**inputs).logits
    with LabelHead(model):
        result(model, inputs)
        handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.train()(**inputs)
        handle.remove()
        assert torch.equal(model.eval()(**inputs).logits, wanted)


def test_a_pass_that_ctrl_c_ends_leaves_the_next_one_complete():
    """torch runs hooks after an `Exception` only."""
    model, inputs = built("llama"), batch(tiny("llama"))
    wanted = model.eval()(**inputs).logits

    def stop(*_):
        raise KeyboardInterrupt

    with LabelHead(model):
        result(model, inputs)
        handle = model.model.layers[1].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model.train()(**inputs)
        handle.remove()
        assert torch.equal(model.eval()(**inputs).logits, wanted)


def test_it_leaves_no_trace():
    model, inputs = built("llama"), batch(tiny("llama"))
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    hooks = lambda: [len(getattr(module, kind)) for module in model.modules() for kind in kinds]  # noqa: E731
    before, state = hooks(), torch.get_rng_state()
    with LabelHead(model):
        result(model, inputs)
        assert hooks() != before
    assert hooks() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
