"""Trainers with smaller batches, streams, loaders, losses and rows of their own."""

import pytest
import torch
from support.trainers import adapted, arguments, rows, train
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, default_data_collator

from siftune import GAST, IST, RST, Keep
from siftune.base.errors import DataError, RecipeError


class Stream(IterableDataset):
    """20 rows: with batches of 4 and accumulation of 2, a pass ends in mid-step."""

    def __iter__(self):
        return iter(list(rows(20)))


class Once(IterableDataset):
    """Rows that can be read only once."""

    def __init__(self):
        self.rows = iter(list(rows()))

    def __iter__(self):
        return self.rows


class ListLoader(Trainer):
    """Its loader is a list of batches."""

    def get_train_dataloader(self):
        data = list(rows())
        return [default_data_collator(data[start : start + 4]) for start in range(0, len(data), 4)]


class Dividing(Trainer):
    """Its loss is a sum divided by the number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:].flatten()
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def of_logits(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().logsumexp(-1).mean()


@pytest.mark.parametrize("method", [GAST(0.5), IST(active=0.5, interval=1, score_batch_size=4)])
def test_scoring_takes_as_few_rows_as_training_does_after_out_of_memory(tmp_path, method):
    model, passes = adapted(), []

    def room_for_two(_, args, kwargs):
        passes.append(len(kwargs["input_ids"]))
        if passes[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")

    model.register_forward_pre_hook(room_for_two, with_kwargs=True)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=2, auto_find_batch_size=True), train_dataset=rows(), callbacks=[method]
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert [count for count in passes if count > 2] == [4, 3]


@pytest.mark.parametrize("make", [lambda: GAST(0.5), lambda: IST(active=0.5, interval=1, score_batch_size=4)])
def test_a_run_that_is_resumed_with_smaller_batches_scores_with_these(tmp_path, make):
    train(tmp_path, make(), max_steps=2, save_strategy="steps", save_steps=1)
    model, passes = adapted(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True)
    settings = {"max_steps": 3, "per_device_train_batch_size": 2}
    train(tmp_path, make(), model=model, resume=str(tmp_path / "checkpoint-1"), **settings)
    assert set(passes) == {2}


class Begins(TrainerCallback):
    """The steps that begin."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_a_stream_that_ends_in_mid_step_begins_no_second_step(tmp_path, monkeypatch):
    begins, choices, penalties = Begins(), [], []
    ist, keep = IST(active=0.5, interval=1), Keep(texts=8, length=12, every=1)
    ist.on_select = choices.append
    real = Keep.on_train_begin

    def on_train_begin(self, *args, **kwargs):
        real(self, *args, **kwargs)
        add = self._penalty.add_gradient
        monkeypatch.setattr(self._penalty, "add_gradient", lambda n, factor: (penalties.append(n), add(n, factor))[1])

    monkeypatch.setattr(Keep, "on_train_begin", on_train_begin)
    train(tmp_path, ist, keep, begins, dataset=Stream(), gradient_accumulation_steps=2)
    assert len(begins.steps) > len(set(begins.steps))  # as transformers does
    assert [choice.step for choice in choices] == penalties == [*range(6)]


class Crops(list):
    """Rows that are cut in another place in each epoch, which loaders announce by `set_epoch`."""

    seen = ()

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        self.seen = (*self.seen, self.epoch)
        return super().__getitem__(index)


@pytest.mark.parametrize("methods", [[GAST(2, "rest")], [RST(), GAST(2, "rest")], []])
def test_a_dataset_that_changes_with_the_epoch_is_told_of_it(tmp_path, methods):
    dataset = Crops(rows())
    train(tmp_path, *methods, dataset=dataset, max_steps=-1, num_train_epochs=3)
    assert [dataset.seen.count(epoch) for epoch in range(3)] == [len(dataset)] * 3


def test_a_loader_that_is_a_list(tmp_path):
    for method in (RST(), GAST(2, "rest")):
        assert train(tmp_path, method, trainer=ListLoader)[1].state.global_step == 6
    for method in (IST(), GAST(2)):
        with pytest.raises(RecipeError, match="the training rows are a list, no DataLoader"):
            train(tmp_path, method, trainer=ListLoader)


@pytest.mark.parametrize("method", [IST(active=0.5, interval=1), GAST(2)])
def test_losses_that_need_the_number_of_items_or_no_labels(tmp_path, method):
    train(tmp_path, method, trainer=Dividing)
    unlabelled = rows().remove_columns("labels")
    trainer = Trainer(
        adapted(), arguments(tmp_path), train_dataset=unlabelled, compute_loss_func=of_logits, callbacks=[method]
    )
    assert trainer.train().global_step == 6


@pytest.mark.parametrize("method", [IST(active=0.5, interval=1, score_batch_size=4), GAST(2)])
@pytest.mark.parametrize("shifted", [False, True])
def test_scoring_counts_labels_as_training_does(tmp_path, monkeypatch, method, shifted):
    data = rows()
    data = data.remove_columns("labels").add_column("labels", data["input_ids"])  # the first token has a label, too
    if shifted:
        data = data.add_column("shift_labels", [row[1:5] + [-100] * 4 for row in data["input_ids"]])
    counts, real = [], Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        inputs = {name: value for name, value in inputs.items() if name != "shift_labels"}
        counts.append(int(num_items_in_batch))
        return real(self, model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    train(tmp_path, method, dataset=data, max_steps=2, remove_unused_columns=False)
    assert len(counts) > 2
    assert set(counts) == {16 if shifted else 28}


@pytest.mark.parametrize("make", [lambda few: GAST(**GAST.with_target, support_set=few), lambda few: Keep(rows=few)])
def test_rows_without_tokens_are_refused(tmp_path, make):
    def collate(batch):
        return {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "attention_mask", "labels")}

    few = [{"prompt": "1 + 1 =", "completion": "2"}] * 8
    with pytest.raises(DataError, match=r"no 'input_ids' .*trainer\.train_dataset"):
        train(tmp_path, make(few), collator=collate)


@pytest.mark.parametrize("method", [IST(), GAST(2)])
def test_a_stream_that_can_be_read_only_once_is_refused(tmp_path, method):
    with pytest.raises(DataError, match="iterator of the Once"):
        train(tmp_path, method, dataset=Once())
    for other in (RST(), GAST(**GAST.with_target, support_set=Once())):  # which take nothing from training
        dataset = Once() if isinstance(other, RST) else None
        assert train(tmp_path, other, dataset=dataset, max_steps=3)[1].state.global_step == 3


def test_nothing_of_a_training_is_logged_in_the_next(tmp_path):
    method, keep = GAST(2, "rest"), Keep(texts=8, length=12, every=1)
    trainer = Trainer(
        args=arguments(tmp_path, max_steps=5, logging_steps=4), train_dataset=rows(), callbacks=[method, keep],
        model_init=lambda: adapted(),
    )  # fmt: skip
    lines = []
    for _ in range(2):
        trainer.train()
        lines.append(
            [{name: line[name] for name in ("gast/score", "keep/kl")} for line in trainer.state.log_history[:1]]
        )
    assert lines[0] == lines[1]
