"""What is recorded of rows in any Trainer is what a loop over the rows finds; and training is as without it."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.tiny_run import recipe, save_rows
from support.trainers import At, adapted, rows, stop, train, weights
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from siftune import GAST, RowRecord
from siftune.base.errors import UnsupportedError
from siftune.data.read import load_rows
from siftune.data.tokens import tokenize_rows
from siftune.models.loss import by_row, row_losses
from siftune.records.visits import read_visits
from siftune.train.run import train as siftune_train

CHECKPOINTING = {
    "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
}  # fmt: skip


def loss_of(model, row):
    """A row's mean cross entropy by a loop over its tokens, in float64."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    found = [
        -logits[at - 1].log_softmax(0)[label].item() for at, label in enumerate(row["labels"]) if at and label != -100
    ]
    return sum(found) / len(found), len(found)


class Loops(Trainer):
    """Computes each row's loss by itself before the step that trains on it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found = []

    def training_step(self, model, inputs, *rest):
        slow = copy.deepcopy(model).double().eval()
        keys = [tuple(ids) for ids in inputs["input_ids"].tolist()]
        for at, ids in enumerate(keys):
            number = next(i for i, row in enumerate(self.train_dataset) if tuple(row["input_ids"]) == ids)
            row = {name: inputs[name][at].tolist() for name in ("input_ids", "labels")}
            self.found.append((self.state.global_step, number, *loss_of(slow, row)))
        return super().training_step(model, inputs, *rest)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 3, **CHECKPOINTING},
        {"dataloader_num_workers": 1, "max_steps": 2},
        {"label_smoothing_factor": 0.1, "max_steps": 2},
        {"train_sampling_strategy": "group_by_length", "max_steps": 2, "length_column_name": "length"},
    ],
    ids=["plain", "accumulation", "workers", "smoothing", "by length"],
)
def test_the_losses_are_those_of_a_loop_over_rows(tmp_path, settings):
    record = RowRecord()
    _, trainer = train(tmp_path, record, trainer=Loops, **settings)
    found = read_visits(tmp_path / "rows.parquet").visits
    wanted = sorted(trainer.found)
    assert [(int(s), int(r)) for s, r in zip(found.step, found.row, strict=True)] == [each[:2] for each in wanted]
    np.testing.assert_allclose(found.loss, [each[2] for each in wanted], rtol=1e-4)
    assert found.tokens.tolist() == [each[3] for each in wanted]
    assert "training_step" not in vars(trainer)
    assert not trainer.model._forward_hooks
    loader = trainer.get_train_dataloader()
    assert isinstance(loader.dataset, Dataset)


def test_training_is_the_same_to_the_bit(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    with_it, _ = train(tmp_path / "with", RowRecord(), GAST(select=2), **settings)
    without, _ = train(tmp_path / "without", GAST(select=2), **settings)
    for name, value in weights(without).items():
        assert torch.equal(value, weights(with_it)[name])


def test_a_resumed_run_has_the_record_of_the_unbroken_one(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    train(tmp_path / "whole", RowRecord(), **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", RowRecord(), At("on_pre_optimizer_step", 6, stop), **settings)
    train(tmp_path / "cut", RowRecord(), resume=True, **settings)
    one, other = (read_visits(tmp_path / name / "rows.parquet").visits.table() for name in ("whole", "cut"))
    np.testing.assert_array_equal(one, other)
    assert one.shape[1] == 48


def test_a_record_of_other_rows_is_not_continued(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, RowRecord(about="some rows"), max_steps=2, **settings)
    record = RowRecord(about="other rows")
    train(tmp_path, record, resume=True, max_steps=3, **settings)
    assert set(record.visits().step.tolist()) == {2}


def test_in_another_trainer_it_writes_another_file(tmp_path):
    record = RowRecord()
    for name in ("first", "second"):
        train(tmp_path / name, record, max_steps=1)
        assert record.path == tmp_path / name / "rows.parquet"
        assert set(read_visits(record.path).visits.step.tolist()) == {0}


def test_after_an_error_training_goes_on_anew(tmp_path):
    record, gast = RowRecord(), GAST(select=2)
    interrupt = At("on_pre_optimizer_step", 3, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, record, gast, interrupt)
    trainer = record._trainer
    assert trainer is not None
    record.leave()
    assert len(read_visits(tmp_path / "rows.parquet").visits) == 12
    trainer.remove_callback(interrupt)
    trainer.train()
    assert "training_step" not in vars(trainer)
    assert len(record.visits()) == 24
    assert gast.last.rows is not None


# --- TRL ---


def text_rows(count=12):
    return Dataset.from_dict(
        {
            "input_ids": [[5 + i, 7, 9, 11 + i, 6] for i in range(count)],
            "labels": [[-100, -100, 9, 11 + i, 6] for i in range(count)],
        }
    )


def test_in_sfttrainer(tmp_path):
    from support.tokenizer import byte_tokenizer

    record = RowRecord(tmp_path / "of rows" / "here.parquet", places=[f"rows.jsonl:{i + 1}" for i in range(12)])
    model = adapted(vocab_size=300)
    before = copy.deepcopy(model).double().eval()
    config = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True}, save_strategy="no",
    )  # fmt: skip
    SFTTrainer(model, config, train_dataset=text_rows(), processing_class=byte_tokenizer(), callbacks=[record]).train()
    found = read_visits(tmp_path / "of rows" / "here.parquet")
    assert sorted(found.visits.row.tolist()) == list(range(12))
    assert found.places == [f"rows.jsonl:{row + 1}" for row in found.visits.row]
    for at in range(4):  # of the first step, before anything changed
        loss, tokens = loss_of(before, text_rows()[int(found.visits.row[at])])
        assert found.visits.loss[at] == pytest.approx(loss, rel=1e-3)
        assert found.visits.tokens[at] == tokens


def test_pairs_are_refused(tmp_path):
    from support.tokenizer import byte_tokenizer

    pairs = Dataset.from_dict({"prompt": ["a"] * 8, "chosen": ["b"] * 8, "rejected": ["c"] * 8})
    config = DPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        adapted(vocab_size=300),
        None,
        config,
        train_dataset=pairs,
        processing_class=byte_tokenizer(),
        callbacks=[RowRecord()],
    )
    with pytest.raises(UnsupportedError, match=r"cannot tell which rows are in a batch.*pairs"):
        trainer.train()


# --- what has no rows is refused, never guessed ---


def turning(features):
    """A collator that puts the rows into another order."""
    features = features[::-1]
    return {name: torch.tensor([row[name] for row in features]) for name in ("input_ids", "attention_mask", "labels")}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows()])


class Twice(Trainer):
    """Goes forward twice."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(**inputs).loss + model(**inputs).loss


class Halves(Trainer):
    """Goes forward in two halves."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        halves = ({name: part[half] for name, part in inputs.items()} for half in (slice(2), slice(2, 4)))
        return sum(model(**half).loss for half in halves)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"collator": turning}, "cannot tell which rows"),
        ({"dataset": Stream()}, "the data set has no index"),
        ({"trainer": Twice}, "called in passes of 4, 4 rows"),
        ({"trainer": Halves}, r"labels are \(4, 8\) and the model's output has \(2, 8, 96\)"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, settings, words):
    with pytest.raises(UnsupportedError, match=words):
        train(tmp_path, RowRecord(), **settings)


def test_a_causal_collator_keeps_rows_apart(tmp_path):
    from support.tokenizer import byte_tokenizer

    ragged = Dataset.from_dict({"input_ids": [list(range(5, 9 + i)) for i in range(8)]})
    tokenizer, record = byte_tokenizer(), RowRecord()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    train(tmp_path, record, dataset=ragged, collator=collator, max_steps=2, model=adapted(vocab_size=300))
    found = record.visits()
    assert {int(row): int(tokens) for row, tokens in zip(found.row, found.tokens, strict=True)} == {
        i: 3 + i for i in range(8)
    }


# --- outputs ---


class Output:
    def __init__(self, **values):
        vars(self).update(values)


def test_rows_without_labels_have_no_loss():
    labels = torch.tensor([[1, 2, 3], [-100, -100, -100]])
    found = by_row(torch.tensor([1.0, 2.0]), labels)
    assert found[0, 0] == 1.5
    assert found[0, 1].isnan()
    assert found[1].tolist() == [2.0, 0.0]


def test_logits_everywhere_at_labels_and_fused_are_one(monkeypatch):
    import siftune.models.loss as module

    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[0, :3] = labels[2, 4:] = -100
    mask = labels[:, 1:] != -100
    log_probs = logits[:, :-1].log_softmax(2).gather(2, labels[:, 1:].clamp_min(0)[..., None])[..., 0] * mask
    whole = row_losses(Output(logits=logits), labels)
    few = logits[:, :-1][mask][None]
    torch.testing.assert_close(row_losses(Output(logits=few), labels), whole)
    torch.testing.assert_close(row_losses(Output(logits=torch.cat([few, few[:, :1]], 1)), labels), whole)
    torch.testing.assert_close(
        row_losses(Output(log_probs=log_probs[mask][None], label_mask=mask[mask][None]), labels), whole
    )
    torch.testing.assert_close(row_losses(Output(logits=None, log_probs=log_probs, label_mask=mask), labels), whole)
    monkeypatch.setattr(module, "_ROW_LOSSES_AT_A_TIME", 22)
    torch.testing.assert_close(row_losses(Output(logits=logits), labels), whole)
    with pytest.raises(UnsupportedError, match="output has no logits"):
        row_losses(Output(logits=None), labels)
    with pytest.raises(UnsupportedError, match=r"output has \(3, 4, 11\)"):
        row_losses(Output(logits=logits[:, :4]), labels)


# --- siftune's own runs ---


def test_a_run_of_siftune_records_its_rows(base, tmp_path):
    from rich.console import Console

    path = save_rows(tmp_path / "rows.jsonl")
    settings = {"method": "gast", "accumulate": 2}
    done = siftune_train(recipe(base, path, tmp_path / "run", **settings), Console(quiet=True))
    found = read_visits(tmp_path / "run" / "rows.parquet")
    assert set(found.places) == {f"{path}:{line}" for line in range(1, 25)}
    assert len(found.visits) == done.summary["steps"] * 4 * 2
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for log in (log for log in logs if "loss" in log):
        step = found.visits.step == log["step"] - 1
        tokens = found.visits.tokens[step]
        assert (found.visits.loss[step] * tokens).sum() / tokens.sum() == pytest.approx(log["loss"], abs=2e-4)
    slow = AutoModelForCausalLM.from_pretrained(base).double().eval()  # as at the first step, before adapters respond
    tokens = tokenize_rows(load_rows(str(path)), done.tokenizer, 64, "none")
    for at in np.flatnonzero(found.visits.step == 0):
        loss, count = loss_of(slow, tokens[int(found.visits.row[at])])
        assert (found.visits.loss[at], found.visits.tokens[at]) == (pytest.approx(loss, rel=1e-3), count)
