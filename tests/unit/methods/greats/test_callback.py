"""GREATS in Trainers: whose rows it compares with, what it follows, and with IST beside it."""

import pytest
import torch
from support.oracles import flat, gradients, sample_gradients
from support.seen import Seen
from support.trainers import Watch, adapted, arguments, rows, train, weights
from transformers import Trainer

from siftune import GREATS, IST
from siftune.methods.greats import greedy


@pytest.fixture(autouse=True)
def three_support_rows(monkeypatch):
    """Unlike a batch, so that passes are distinguished by size."""
    monkeypatch.setattr("siftune.methods.greats.SUPPORT_SIZE", 3)


SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def trained(folder, method, *before, **settings):
    """The model, what it was trained on, and which parameters changed in each step."""
    model = adapted()
    seen = Seen(model)
    _, trainer = train(folder, *before, method, model=model, **{**SGD, **settings})
    return model, seen.all, next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))


def test_a_step_follows_the_chosen_rows_of_every_batch(tmp_path):
    method = GREATS(2, keep=True)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2}
    model, (support, *batches), _ = trained(tmp_path, method, **settings)
    plain = adapted()
    labels = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in batches)
    assert len(method.history) == len(batches) == 2
    expected = weights(plain)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    h = torch.cat([grad.flatten() for grad in gradients(plain, support).values()]).double()
    for choice, inputs in zip(method.history, batches, strict=True):
        share = int((inputs["labels"][:, 1:] != -100).sum()) / labels
        single = {p: grads * share for p, grads in sample_gradients(plain, inputs).items()}
        vectors = flat(single, parameters)
        torch.testing.assert_close(choice.scores[0].double(), vectors @ h, rtol=1e-3, atol=1e-7)
        every = torch.ones(4, dtype=torch.bool)
        chosen = greedy(vectors @ h, vectors @ vectors.T, every, 2, 0.1 * 4 / 2)  # η B/K
        assert choice.selected[0].tolist() == sorted(chosen.tolist())
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                expected[name] -= 0.1 * single[parameter][chosen].sum(0) * 4 / 2
    for name, value in weights(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", [None, rows(7, seed=9)], ids=["training set", "target"])
def test_support_rows_come_from_the_target_if_there_is_one(tmp_path, target):
    _, seen, _ = trained(tmp_path, GREATS(2, support_set=target))
    drawn = [row for inputs in seen if len(inputs["input_ids"]) == 3 for row in inputs["input_ids"].tolist()]
    source = target or rows()
    assert len(drawn) == 6 * 3
    assert all(row in source["input_ids"] for row in drawn)
    assert len({tuple(row) for row in drawn}) > 3


def test_with_ist_the_active_layers_follow_one_choice(tmp_path):
    layers = IST(active=0.5, interval=2, score_batch_size=6)
    chosen, method = [], GREATS(2, keep=True)
    layers.on_select = chosen.append
    _, _, watch = trained(tmp_path, method, layers)
    assert len({choice.layers for choice in chosen}) > 1
    for choice, changed in zip(chosen, watch.changed, strict=True):
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in changed} == set(choice.layers)
    assert all(choice.selected.shape == (1, 2) and choice.scores.isfinite().all() for choice in method.history)


def test_scaled_losses_do_not_change_the_choice(tmp_path):
    """As in float16: every sample's gradient has the scaler's factor, the support's has not."""
    found = []
    for scale in (None, 65536.0):
        method, model = GREATS(2, keep=True), adapted()
        trainer = Trainer(model, arguments(tmp_path, **SGD), train_dataset=rows(), callbacks=[method])
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        found.append(method.history)
    assert len(found[0]) == len(found[1]) == 6
    for plain, scaled in zip(*found, strict=True):
        assert torch.equal(plain.selected, scaled.selected)
        torch.testing.assert_close(plain.scores, scaled.scores, rtol=1e-3, atol=1e-7)
