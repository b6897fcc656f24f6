"""Training after a training that an exception ended; two methods on the same layers."""

import pytest
import torch
from support.every_method import NAMES, FirstGradients, built
from support.seen import assert_same
from support.trainers import At, adapted, arguments, rows, stop, train, weights
from transformers import Trainer, TrainerCallback, get_constant_schedule

from siftune import GAST, IST, RST, Keep
from siftune.base.errors import RecipeError, SiftuneError


def first_gradients(folder, *callbacks, model=None, **settings):
    spy = FirstGradients()
    train(folder, *callbacks, spy, model=model, **{"max_steps": 1, "max_grad_norm": 0.0, **settings})
    return spy.found


class Once(TrainerCallback):
    """Ctrl-C within the first step of the first training."""

    def __init__(self):
        self.came = False

    def on_pre_optimizer_step(self, *_, **__):
        if not self.came:
            self.came = True
            raise KeyboardInterrupt


def interrupted(folder, name):
    """A model after Ctrl-C within its first step, before it changed."""
    model = adapted()
    with pytest.raises(KeyboardInterrupt):
        train(folder, *built(name), At("on_pre_optimizer_step", 1, stop), model=model)
    model.zero_grad()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_training_leaves_nothing_to_plain_training(tmp_path, name):
    model = interrupted(tmp_path, name)
    assert_same(first_gradients(tmp_path, model=model), first_gradients(tmp_path))


@pytest.mark.parametrize(("name", "kind"), [("rst", "lora"), ("ist+gast", "lora"), ("ist+gast", "dora")])
def test_ctrl_c_within_a_module_leaves_the_model_as_it_was(tmp_path, name, kind):
    """Parameters are swapped there, and torch runs the hooks that restore them only after an `Exception`."""
    for last in range(1, len(passes_of(tmp_path, name, kind)) + 1):  # passes of the method, of training, of evaluation
        model = adapted(kind=kind)
        before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(KeyboardInterrupt):
            passes_of(tmp_path, name, kind, model, last)
        assert {key: (id(p), p.requires_grad) for key, p in model.named_parameters()} == before
        assert {key: value.shape for key, value in model.state_dict().items()} == {
            key: value.shape for key, value in state.items()
        }


def passes_of(folder, name, kind, model=None, last=0):
    """Calls of an adapted module in two steps with evaluation; Ctrl-C comes in the last one."""
    model, calls = model or adapted(kind=kind), []

    def count(*_):
        calls.append(None)
        if len(calls) == last:
            raise KeyboardInterrupt

    module = model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"]
    handle = module.register_forward_pre_hook(count)
    settings = arguments(folder, max_steps=2, eval_strategy="steps", eval_steps=1)
    try:
        Trainer(model, settings, train_dataset=rows(), eval_dataset=rows(4), callbacks=built(name)).train()
    finally:
        handle.remove()
    return calls


class Averaging(torch.optim.AdamW):
    """As optimizers that average weights: those of the average are in the model after `eval()`."""

    is_training = True

    def train(self):
        self.is_training = True

    def eval(self):
        self.is_training = False


@pytest.mark.parametrize("name", [*NAMES, "keep"])
def test_passes_of_methods_see_the_weights_that_train(tmp_path, name):
    model, seen, evaluating = adapted(), [], []
    optimizer = Averaging([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    class Own(Trainer):
        def evaluate(self, *args, **kwargs):
            evaluating.append(None)
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                evaluating.pop()

    def note(*_):
        if not evaluating:
            seen.append(optimizer.is_training)

    model.register_forward_pre_hook(note)
    callbacks = [Keep(texts=4, length=8, every=1)] if name == "keep" else built(name)
    Own(
        model, arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1), train_dataset=rows(),
        eval_dataset=rows(4), callbacks=callbacks, optimizers=(optimizer, get_constant_schedule(optimizer)),
    ).train()  # fmt: skip
    assert len(seen) >= 4
    assert all(seen)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_trainer_trains_again(tmp_path, name):
    """As after an error out of memory, or when a cell of a notebook runs again."""
    model, callbacks, spy = adapted(), built(name), FirstGradients()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=1, max_grad_norm=0.0), train_dataset=rows(),
        callbacks=[*callbacks, Once(), spy],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model.zero_grad()
    trainer.train()
    assert_same(spy.found, first_gradients(tmp_path, *built(name)))


def test_a_callback_that_is_refused_leaves_no_hooks(tmp_path):
    model = adapted()
    with pytest.raises(RecipeError, match="already"):
        train(tmp_path, GAST(select=2), GAST(select=2), model=model)
    with pytest.raises(SiftuneError):
        train(tmp_path, GAST(support="dataset"), model=model)
    assert_same(first_gradients(tmp_path, GAST(select=2), model=model), first_gradients(tmp_path, GAST(select=2)))


@pytest.mark.parametrize(
    "callbacks",
    [(GAST(select=2), GAST(select=2)), (RST(active=0.5), IST(active=0.5))],
)
def test_two_methods_of_a_kind_are_refused(tmp_path, callbacks):
    with pytest.raises(RecipeError, match="already: use one of them"):
        train(tmp_path, *callbacks)


def test_a_training_loop_of_another_name(tmp_path):
    """As that of libraries that replace `train`."""

    class Other(Trainer):
        def loop(self, resume_from_checkpoint=None):
            return self._inner_training_loop(batch_size=4, args=self.args)

        train = loop

    _, other = train(tmp_path, *built("ist"), trainer=Other)
    _, usual = train(tmp_path, *built("ist"))
    assert_same(weights(other.model), weights(usual.model))
