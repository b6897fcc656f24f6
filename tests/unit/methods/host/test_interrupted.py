"""Training after a training that an exception ended; two methods on the same layers."""

import pytest
from support.every_method import NAMES, FirstGradients, built
from support.seen import assert_same
from support.trainers import At, adapted, arguments, rows, stop, train, weights
from transformers import Trainer, TrainerCallback

from siftune import GAST, IST, RST, LabelLogits
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


@pytest.mark.parametrize("name", NAMES)
def test_the_same_method_begins_anew_on_an_interrupted_model(tmp_path, name):
    model = interrupted(tmp_path, name)
    assert_same(first_gradients(tmp_path, *built(name), model=model), first_gradients(tmp_path, *built(name)))


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
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    model = adapted()
    with pytest.raises(SiftuneError, match="Own"):
        train(tmp_path, GAST(select=2), LabelLogits(), model=model, trainer=Own)
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
