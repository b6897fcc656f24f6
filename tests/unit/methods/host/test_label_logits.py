"""Logits at labels alone in anybody's Trainer: what is learned and logged is the same."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny import batch
from support.tokenizer import byte_tokenizer
from support.trainers import adapted, arguments, train, weights
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from siftune import GAST, IST, LabelLogits
from siftune.base.errors import UnsupportedError
from siftune.methods.host.label_logits import _refuse_readers
from siftune.models.loss import find_output_embeddings


class Positions:
    """Counts the positions of which logits are computed, by whoever computes them."""

    def __init__(self, model):
        self.total = 0
        find_output_embeddings(model).register_forward_hook(lambda _, args, __: self.count(args[0]))

    def count(self, hidden):
        self.total += hidden.numel() // hidden.shape[-1]


@pytest.mark.parametrize(
    ("others", "accumulate"),
    [
        (lambda: [], 1),
        (lambda: [IST(active=0.5, interval=2, score_batch_size=4), GAST(select=2, support_size=3)], 2),
    ],
    ids=["dense", "ist+gast"],
)
def test_a_trainer_learns_the_same(tmp_path, others, accumulate):
    settings = {"gradient_accumulation_steps": accumulate, "max_steps": 4}
    plain, fewer = adapted(), adapted()
    counts = Positions(plain), Positions(fewer)
    _, first = train(tmp_path, *others(), model=plain, **settings)
    _, second = train(tmp_path, *others(), LabelLogits(), model=fewer, **settings)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(fewer)[name], value, rtol=1e-4, atol=1e-6)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert counts[1].total < 0.9 * counts[0].total  # two of eight tokens have no label
    assert not fewer.get_base_model()._forward_pre_hooks


def sft(folder, callbacks, **settings):
    data = [{"prompt": f"What is {i} and {i} in all?", "completion": f" {2 * i}."} for i in range(12)]
    from datasets import Dataset

    model = adapted(vocab_size=300)
    trainer = SFTTrainer(
        model,
        arguments(folder, SFTConfig, max_steps=3, bf16=False, activation_checkpointing=False, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
    )
    return model, trainer


def test_trls_trainer_learns_and_logs_the_same(tmp_path, monkeypatch):
    from trl.trainer import utils

    scored, original = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda *given: scored.append(len(given[0])) or original(*given)
    )
    runs = []
    for callbacks in ([], [LabelLogits()]):
        model, trainer = sft(tmp_path, callbacks, gradient_accumulation_steps=2)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((weights(model), logs, sum(scored)))
        scored.clear()
    (plain, logs, positions), (fewer, again, less) = runs
    for name, value in plain.items():
        torch.testing.assert_close(fewer[name], value, rtol=1e-4, atol=1e-6)
    for one, other in zip(logs, again, strict=True):
        for figure in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
            assert one[figure] == pytest.approx(other[figure], rel=1e-4)
    assert less < 0.5 * positions


def test_an_older_trl_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("siftune.methods.host.label_logits._has_fused_head", lambda: False)
    _, trainer = sft(tmp_path, [LabelLogits()])
    with pytest.raises(UnsupportedError, match="TRL"):
        trainer.train()


def test_trainers_that_read_logits_are_refused(tmp_path):
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(UnsupportedError, match="Own"):
        train(tmp_path, LabelLogits(), trainer=Own)
    from datasets import Dataset

    pairs = Dataset.from_list([{"prompt": "a?", "chosen": " b", "rejected": " c"}] * 4)
    trainer = DPOTrainer(
        adapted(vocab_size=300), args=arguments(tmp_path, DPOConfig, max_steps=1, bf16=False), train_dataset=pairs,
        processing_class=byte_tokenizer(), callbacks=[LabelLogits()],
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="DPOTrainer"):
        trainer.train()


@pytest.mark.parametrize(
    ("change", "said"), [({"n_gpu": 2}, "nn.DataParallel"), ({"torch_compile": True}, "torch_compile")]
)
def test_what_it_cannot_do(change, said):
    args = SimpleNamespace(**{"n_gpu": 1, "torch_compile": False, **change})
    with pytest.raises(UnsupportedError, match=said):
        LabelLogits().on_train_begin(args, None, None, model=adapted())


def test_a_trainer_without_labels_for_the_model_is_left_alone(tmp_path):
    """Label smoothing takes the labels away before the model is called, and reads all logits."""
    models = []
    for callbacks in ([], [LabelLogits()]):
        model, _ = train(tmp_path, *callbacks, model=adapted(), max_steps=2, label_smoothing_factor=0.1)
        models.append(weights(model))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_interrupted_training_can_be_tidied_up(tmp_path):
    class Fail(Trainer):
        def training_step(self, *args, **kwargs):
            raise OSError("no luck")

    model, callback = adapted(), LabelLogits()
    with pytest.raises(OSError, match="no luck"):
        train(tmp_path, callback, model=model, trainer=Fail)
    callback.remove()
    callback.remove()
    assert not model.get_base_model()._forward_pre_hooks


@pytest.mark.parametrize(
    ("module", "name", "place", "setting"),
    [
        ("axolotl.core.trainers.base", "AxolotlTrainer", "args", "orpo_alpha"),
        ("llamafactory.train.sft.trainer", "CustomSeq2SeqTrainer", "finetuning_args", "use_asft_loss"),
    ],
)
def test_tools_are_refused_where_they_add_a_loss_alone(module, name, place, setting):
    """Their Trainers by name: what the tools' own do was tried in each."""
    kind = type(name, (Trainer,), {"__module__": module, "compute_loss": Trainer.compute_loss})
    trainer = kind.__new__(kind)
    setattr(trainer, place, SimpleNamespace(**{setting: None}))
    _refuse_readers(trainer)
    setattr(trainer, place, SimpleNamespace(**{setting: 0.1}))
    with pytest.raises(UnsupportedError, match=name):
        _refuse_readers(trainer)


def test_a_loop_with_a_method_that_compares_with_rows():
    model, method = adapted(), GAST(select=2)
    inputs = batch(model, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with LabelLogits().attach(model), method.attach(model.train(), batches=[inputs], optimizer=optimizer) as sift:
        for _ in range(2):
            model(**inputs).loss.backward()
            assert sift.last.selected.shape[1] == 2
            optimizer.step()


def test_a_resumed_loop_with_a_method_that_compares_with_rows():
    model = adapted().train()
    inputs = batch(model, 4)
    with LabelLogits().attach(model), GAST(select=2).attach(model, batches=[inputs]) as sift:
        sift.load_state_dict(sift.state_dict())
        model(**inputs).loss.backward()
        assert sift.last.selected.shape[1] == 2


def test_an_evaluation_before_the_first_step_takes_no_support_rows():
    model, taken = adapted(), []
    inputs = batch(model, 4)

    def batches():
        while True:
            taken.append(1)
            yield inputs

    with GAST(select=2).attach(model.train(), batches=batches()):
        with torch.no_grad():
            model(**inputs)
        assert not taken
        model(**inputs).loss.backward()
        assert taken
