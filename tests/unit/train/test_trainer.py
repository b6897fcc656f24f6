"""SiftTrainer trains as transformers' Trainer does, and stops before broken numbers reach the weights."""

import logging

import pytest
import torch
from support.adapted import shake
from support.tiny import tiny
from support.trainers import adapted, arguments, rows, weights
from transformers import Trainer

from siftune.models.adapters.attach import attach_adapter
from siftune.train.trainer import SiftTrainer


def fit(kind, folder, model=None, callbacks=(), **settings):
    """Train; return the model's weights and the Trainer."""
    model = adapted() if model is None else model
    trainer = kind(model, arguments(folder, **settings), train_dataset=ragged(), callbacks=list(callbacks))
    trainer.train()
    return weights(model), trainer


def ragged():
    """Rows with different numbers of labels, so that a mean per micro-batch is not the mean over all of them."""
    data = rows()

    def hide(row, index):
        labels = row["labels"]
        return {"labels": [-100] * (2 + index % 5) + labels[2 + index % 5 :]}

    return data.map(hide, with_indices=True)


def assert_same(ours, theirs):
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_are_those_of_the_plain_trainer(family, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    ours, trainer = fit(SiftTrainer, tmp_path, adapted(family, layers=2), **settings)
    theirs, plain = fit(Trainer, tmp_path, adapted(family, layers=2), **settings)
    assert_same(ours, theirs)
    assert any(not torch.equal(value, weights(adapted(family, layers=2))[name]) for name, value in ours.items())
    for one, other in zip(trainer.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3, "max_steps": 4}])
def test_weights_with_adam_and_clipping(tmp_path, settings):
    settings = {"max_grad_norm": 0.1, "adam_epsilon": 1e-3, **settings}
    assert_same(fit(SiftTrainer, tmp_path, **settings)[0], fit(Trainer, tmp_path, **settings)[0])


def test_a_model_that_takes_no_number_of_items(tmp_path):
    """Each micro-batch then has a mean of its own in the plain Trainer; here all labels count alike."""
    settings = {"gradient_accumulation_steps": 3, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    model = adapted()
    model.get_base_model().accepts_loss_kwargs = False
    assert_same(fit(SiftTrainer, tmp_path, model, **settings)[0], fit(Trainer, tmp_path, **settings)[0])


def count_logits(model):
    """Count the positions for which logits are computed, call by call."""
    counts = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: counts.append(out.shape[1]) or None)
    return counts


def test_logits_exist_at_label_positions_only(tmp_path):
    model = adapted()
    counts = count_logits(model)
    fit(SiftTrainer, tmp_path, model, max_steps=2)
    labels = sum(sum(label != -100 for label in row["labels"][1:]) for row in ragged())
    # two passes compare the loss with the model's own, on one row of eight tokens
    assert counts[1] == 8
    assert all(0 < count <= 4 * 6 for count in counts[2:])
    assert sum(counts[2:]) < labels


def scaled(factor=3.0):
    """A model whose own loss is another one."""
    model = adapted()
    inner = model.get_base_model()
    usual = inner.loss_function
    inner.loss_function = lambda *args, **kwargs: factor * usual(*args, **kwargs)
    return model


def mixture():
    """A mixture of experts that adds a loss for the balance of its router."""
    model = attach_adapter(tiny("mixtral", 2, output_router_logits=True, router_aux_loss_coef=0.5), rank=2)
    return shake(model)


@pytest.mark.parametrize(
    "build",
    [scaled, mixture],
)
def test_where_the_loss_of_the_model_is_another_it_is_used(tmp_path, caplog, build):
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2}
    settings["max_grad_norm"] = 0.0
    with caplog.at_level(logging.WARNING, "siftune"):
        ours, trainer = fit(SiftTrainer, tmp_path, build(), **settings)
    (record,) = caplog.records
    assert record.message.startswith("logits are computed at all positions")
    theirs, plain = fit(Trainer, tmp_path, build(), **settings)
    assert_same(ours, theirs)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)


def test_the_same_loss_gives_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "siftune"):
        fit(SiftTrainer, tmp_path, scaled(1.0), max_steps=1)
    assert not caplog.records


def test_evaluation_gives_the_loss_of_the_model(tmp_path):
    losses = []
    for kind in (SiftTrainer, Trainer):
        settings = arguments(tmp_path, prediction_loss_only=True)
        losses.append(kind(adapted(), settings, train_dataset=ragged(), eval_dataset=ragged()).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_evaluation_leaves_out_losses_that_are_not_finite(tmp_path, monkeypatch):
    compute, calls = SiftTrainer.compute_loss, []

    def first_broken(self, *args, **kwargs):
        calls.append(1)
        loss, *rest = compute(self, *args, **kwargs)
        return (loss * torch.nan if len(calls) == 1 else loss, *rest)

    monkeypatch.setattr(SiftTrainer, "compute_loss", first_broken)
    settings = arguments(tmp_path, prediction_loss_only=True, logging_nan_inf_filter=False)
    trainer = SiftTrainer(adapted(), settings, train_dataset=ragged(), eval_dataset=ragged())
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(calls) > 1


def test_a_first_batch_without_labels_decides_nothing(tmp_path, caplog):
    model = adapted()
    counts = count_logits(model)
    data = rows(8)
    data = data.map(lambda row, index: {"labels": [-100] * 8 if index < 4 else row["labels"]}, with_indices=True)
    settings = arguments(tmp_path, max_steps=2, train_sampling_strategy="sequential")
    with caplog.at_level(logging.WARNING, "siftune"):
        SiftTrainer(model, settings, train_dataset=data).train()
    assert not caplog.records
    assert counts[-1] == 4 * 6
