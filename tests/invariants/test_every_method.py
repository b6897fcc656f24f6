"""What holds of every method: its limit, accumulation, checkpointing, resuming, removal."""

from contextlib import ExitStack

import pytest
import torch
from support.every_method import CASES, NAMES, SUPPORT_SIZE, attached, built, chooses_rows, parts
from support.oracles import sample_gradients
from support.seen import Seen, assert_same
from support.tiny import batch
from support.trainers import adapted, rows, train, weights

from siftune.engine.groups import group_by_layer
from siftune.methods import METHODS, all_parts

CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}

ADAM = {"weight_decay": 0.1, "adam_epsilon": 1e-3}  # so large that a fresh state does not follow signs of rounding

every_method = pytest.mark.parametrize("name", NAMES)


def test_every_method_has_its_limit():
    assert set(CASES) == {part.settings.group for part in all_parts()}
    assert set(NAMES) == set(METHODS) - {"dense"}


def assert_same_choices(first, second, exactly=True):
    for one, other in zip(first, second, strict=True):
        assert len(one.all) == len(other.all)
        for a, b in zip(one.all, other.all, strict=True):
            assert (a.step, a.layers) == (b.step, b.layers)
            if hasattr(a, "selected"):
                assert torch.equal(a.selected, b.selected)
                tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-3, "atol": 1e-7}
                torch.testing.assert_close(a.scores, b.scores, equal_nan=True, **tolerance)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights after eight steps of plain training, with dropout in the adapters."""
    model, _ = train(tmp_path_factory.mktemp("plain"), model=adapted(dropout=0.2), max_steps=8)
    return weights(model)


@every_method
def test_at_its_limit_it_is_plain_training_bit_for_bit(tmp_path, plain, name):
    model, _ = train(tmp_path, *built(name, "limit"), model=adapted(dropout=0.2), max_steps=8)
    assert_same(plain, weights(model))


def sums_of(model, name, inputs, labels, layers, choice):
    """A micro-batch's part of the gradients: of all samples, or B/K times those of the samples that were chosen."""
    share = int((inputs["labels"][:, 1:] != -100).sum()) / labels
    single = {p: grads * share for p, grads in sample_gradients(model, inputs).items()}
    for group in group_by_layer(model):
        for parameter in group.parameters.values() if group.index in layers else ():
            grads = single[parameter]
            if choice is not None:
                grads = grads[choice.selected[choice.layers.index(group.index)]] * len(grads) / choice.selected.shape[1]
            yield parameter, grads.sum(0)


@pytest.mark.parametrize(
    ("name", "accumulate", "kind"),
    [*((name, 2, "lora") for name in NAMES), ("ist+gast", 1, "parallel"), ("gast", 4, "lora")],
)
def test_it_is_the_loop_that_follows_its_choices(tmp_path, name, accumulate, kind):
    """Against gradients of single samples: what was chosen is in them, all else is not; state goes where it is to."""
    methods, model, loop = built(name), adapted(kind=kind), adapted(kind=kind).train()
    seen = Seen(model)
    train(
        tmp_path, *methods, model=model, dataset=rows(48), lr_scheduler_type="constant",
        gradient_accumulation_steps=accumulate, **ADAM,
    )  # fmt: skip
    batches = [inputs for inputs in seen.all if len(inputs["input_ids"]) != SUPPORT_SIZE]
    rows_of = {(c.step, c.batch): c for c in methods[-1].all} if chooses_rows(name) else {}
    layers_of = dict.fromkeys(range(6), (0, 1, 2, 3))
    layers_of |= {} if parts(name)[0].rows else {c.step: c.layers for c in methods[0].all}
    assert len(rows_of) == (len(batches) if chooses_rows(name) else 0)
    trained = [(name_of, p) for name_of, p in loop.named_parameters() if p.requires_grad]
    decay = [  # the Trainer's: biases do not decay
        {"params": [p for name_of, p in trained if name_of.endswith("bias") == is_bias], "weight_decay": rate}
        for is_bias, rate in ((False, 0.1), (True, 0.0))
    ]
    optimizer = torch.optim.AdamW(decay, lr=1e-2, eps=1e-3)
    for step in range(6):
        micro = batches[step * accumulate : (step + 1) * accumulate]
        labels = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in micro)
        for number, inputs in enumerate(micro):
            for parameter, total in sums_of(loop, name, inputs, labels, layers_of[step], rows_of.get((step, number))):
                parameter.grad = total if parameter.grad is None else parameter.grad + total
        torch.nn.utils.clip_grad_norm_(loop.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for key, value in weights(model).items():
        torch.testing.assert_close(value, weights(loop)[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if not chooses_rows(name)])
def test_layers_in_parts_of_a_batch_are_those_of_the_full_batch(tmp_path, name):
    accumulate = 2
    whole, apart = built(name), built(name)
    expected, _ = train(tmp_path, *whole, per_device_train_batch_size=8)
    model, _ = train(
        tmp_path, *apart, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate
    )
    assert_same_choices(whole, apart)
    for key, value in weights(expected).items():
        torch.testing.assert_close(weights(model)[key], value, rtol=1e-4, atol=1e-5)


@every_method
def test_checkpointing_changes_nothing(tmp_path, name):
    plainly, again = built(name), built(name)
    expected, _ = train(tmp_path, *plainly)
    model, _ = train(tmp_path, *again, **CHECKPOINTING)
    assert_same_choices(plainly, again, exactly=False)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if chooses_rows(name) else {"rtol": 1e-5, "atol": 1e-6}
    for key, value in weights(expected).items():
        torch.testing.assert_close(weights(model)[key], value, **tolerance)


# epochs have six steps. The Trainer's own restoring sorts callbacks by name, so that GAST comes before IST
@pytest.mark.parametrize(
    ("name", "restore", "stop"),
    [*((name, False, 4) for name in NAMES), ("ist", True, 4), ("gast", True, 6)],
)
def test_resume_is_bitwise_the_unbroken_run(tmp_path, name, restore, stop):
    settings = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": stop,
        "restore_callback_states_from_checkpoint": restore,
    }  # fmt: skip
    whole, again = built(name), built(name)
    unbroken, _ = train(tmp_path, *whole, model=adapted(dropout=0.2), **settings)
    model, _ = train(
        tmp_path, *again, model=adapted(dropout=0.2), resume=str(tmp_path / f"checkpoint-{stop}"), **settings
    )
    assert_same(weights(unbroken), weights(model))
    if not restore:  # else the Trainer has made callbacks of its own, without ours
        for method in whole:
            method.all = [choice for choice in method.all if choice.step >= stop]
        assert_same_choices(whole, again)


def traces(model):
    """What hooks, substitutes and tapes could leave on a model."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    modules = {
        name: (type(m), set(vars(m)), m.training, [list(getattr(m, kind)) for kind in hooks])
        for name, m in model.named_modules()
    }
    tensors = ("_backward_hooks", "_post_accumulate_grad_hooks")
    parameters = {
        name: (id(p), p.requires_grad, [bool(getattr(p, kind, None)) for kind in tensors])
        for name, p in model.named_parameters()
    }
    return modules, parameters


@pytest.mark.parametrize("fails", [False, True])
@every_method
def test_it_leaves_no_trace(name, fails):
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    before, generator = traces(model), torch.get_rng_state()
    inputs = batch(model, 4)
    logits, values = model(**inputs).logits, weights(model)
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(OSError, match="no luck"))
        attached(stack, name, model, optimizer)
        assert traces(model) != before
        for step in range(3):
            model(**inputs).loss.backward()
            if fails and step == 1:
                raise OSError("no luck")
            optimizer.step()
            optimizer.zero_grad()
    assert traces(model) == before
    assert torch.equal(model(**inputs).logits, logits)
    assert_same(values, weights(model))
    assert torch.equal(torch.get_rng_state(), generator)
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == (0, 0)


@every_method
def test_the_trainer_leaves_no_trace(tmp_path, name):
    model, _ = train(tmp_path, max_steps=2)  # which leaves traces of its own
    before = traces(model)
    train(tmp_path, *built(name), model=model, max_steps=2)
    assert traces(model) == before
