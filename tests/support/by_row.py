"""Steps of the baselines and of siftune's engine on tiny models, for the tests of both."""

import torch
from support.adapted import adapted
from support.oracles import summed_loss
from support.trainers import adapted as trainable
from support.trainers import arguments, rows, weights

from lab.baseline_trainer import BaselineTrainer
from lab.baselines import StoreAll, TwoPass
from siftune import GAST
from siftune.methods.drivers.batches import UserBatches
from siftune.methods.options import GASTSettings
from siftune.train.trainer import SiftTrainer

PASSES = {TwoPass: [6, 6], StoreAll: [6]}  # rows of every pass over the model, for 3 of 6 rows


def double(family="llama", **settings):
    return adapted(family, **settings).double()


def runner(model, seen=None):
    """Forward and backward on a batch, noting its size."""

    def run(part):
        if seen is not None:
            seen.append(len(part["input_ids"]))
        loss = summed_loss(model, part)
        loss.backward()
        return loss.detach()

    return run


def taken(model):
    """Gradients, which are cleared."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def by_engine(model, settings, batches, support=None):
    """Choices and gradients of siftune's engine, one optimizer step per batch."""
    found = []
    with GAST(**settings).attach(model, batches=support, loss=summed_loss) as sift:
        for inputs in batches:
            summed_loss(model, inputs).backward()
            found.append((sift.last, taken(model)))
            sift.step()
    return found


def by_baseline(kind, model, settings, batches, support=None, run=None):
    draws = UserBatches(support) if support is not None else None
    own = {name: value for name, value in settings.items() if name != "seed"}
    baseline, found = kind(model, GASTSettings(**own), draws, loss=summed_loss, seed=settings.get("seed", 0)), []
    for inputs in batches:
        baseline.begin()
        baseline.step(inputs, run or runner(model))
        found.append((baseline.last, taken(model)))
    return found


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (choice, grads), (wanted, wanted_grads) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(choice.scores, wanted.scores, rtol=1e-10, atol=1e-10)
        assert torch.equal(choice.selected, wanted.selected)
        assert grads.keys() == wanted_grads.keys()
        for name, grad in wanted_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-10)


def trained(folder, support, kind=None, **settings):
    """Weights after a few steps, and the choices, with GAST as a callback or with a baseline in its place."""
    settings = {"learning_rate": 0.1, "optim": "sgd", "max_steps": 3, "gradient_accumulation_steps": 2, **settings}
    model, choices = trainable(), []
    gast = GAST(support=support, seed=2, keep=True)
    callbacks = [] if kind else [gast]
    trainer = SiftTrainer(model, arguments(folder, **settings), train_dataset=rows(), callbacks=callbacks)
    if kind:
        trainer = BaselineTrainer.take_over(trainer, kind, gast, gast.seed)
        step = trainer.baseline.step

        def watched(*args):
            loss = step(*args)
            choices.append(trainer.baseline.last)
            return loss

        trainer.baseline.step = watched
    trainer.train()
    return weights(model), choices if kind else gast.history
