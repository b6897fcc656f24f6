"""Training on some rows of a batch: steps against passes over single rows, and the rules that keep rows."""

import pytest
import torch
from datasets import Dataset
from support.oracles import gradients
from support.tiny import VOCAB
from support.trainers import adapted, arguments, weights
from transformers import TrainerCallback

from lab.pays.followed import Followed
from lab.pays.subset import Book, Keep, SubsetTrainer
from siftune.base.errors import RecipeError
from siftune.data.batches import Collator
from siftune.train.trainer import SiftTrainer

GROUPS = ("target", "wrong", "other")


def ragged(count=12, groups=GROUPS, seed=0):
    """Tokenised rows of different lengths with one to three labels, and what they stand for."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, rows = [], [], []
    for place in range(count):
        length = 5 + place % 4
        tokens = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        known = 1 + place % 3
        ids.append(tokens)
        labels.append([-100] * (length - known) + tokens[length - known :])
        rows.append({"prompt": str(place), "completion": "", "group": groups[place % len(groups)]})
    return Dataset.from_dict({"input_ids": ids, "labels": labels}), rows


class Grads(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_pre_optimizer_step(self, *_, **__):
        named = self.model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def subset_run(folder, keep, model=None, data=None, loss=None, score=None, **settings):
    """Train with a rule on a tiny model; the model, its Trainer, and the gradients of every step."""
    model = (model if model is not None else adapted()).double()
    data, rows = data or ragged()
    grads = Grads(model)
    usual = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    args = arguments(folder, **{"max_steps": 3, **usual, **settings})
    trainer = SiftTrainer(model, args, Collator(0), data, callbacks=[grads])
    trainer = SubsetTrainer.take_over(trainer, Book(data, rows), Followed([row["group"] for row in rows]), keep)
    trainer.loss, trainer.score = loss, score
    seen, step = [], trainer.training_step

    def note(model, inputs, items):
        seen.append(({k: v.clone() for k, v in inputs.items()}, weights(model)))
        return step(model, inputs, items)

    trainer.training_step = note
    trainer.train()
    return model, trainer, grads.steps, seen


def loop_gradients(model, batch, kept):
    """Mean over the labels of the kept rows, from a pass over each row by itself, without padding."""
    total = sum(int((batch["labels"][row] != -100).sum()) for row in kept)
    sums = {}
    for row in kept:
        length = int(batch["attention_mask"][row].sum())
        single = {name: values[row : row + 1, :length] for name, values in batch.items()}
        for parameter, grad in gradients(model, single, divisor=total).items():
            sums[parameter] = sums.get(parameter, 0) + grad
    return {name: sums[p] for name, p in model.named_parameters() if p in sums}


class Fixed:
    """A rule that keeps given places."""

    def __init__(self, *places):
        self.places = torch.tensor(places, dtype=torch.int64)

    def __call__(self, model, batch, rows):
        return self.places


@pytest.mark.parametrize("kept", [(1,), (0, 3), (0, 1, 2, 3)])
def test_a_step_is_that_of_the_kept_rows_alone(tmp_path, kept):
    _, _, steps, seen = subset_run(tmp_path, Fixed(*kept))
    assert len(steps) == 3
    for grads, (batch, before) in zip(steps, seen, strict=True):
        oracle = adapted().double()
        with torch.no_grad():
            for name, parameter in oracle.named_parameters():
                if name in before:
                    parameter.copy_(before[name])
        wanted = loop_gradients(oracle, batch, kept)
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-7)  # the loss is formed in float32


def test_a_batch_of_which_nothing_is_kept_changes_nothing(tmp_path):
    """Not even through Adam's moments, and the steps continue."""
    start = weights(adapted().double())
    model, trainer, steps, _ = subset_run(tmp_path, Fixed(), optim="adamw_torch", weight_decay=0.1)
    assert trainer.state.global_step == 3
    assert steps == [{}, {}, {}]
    for name, value in weights(model).items():
        assert torch.equal(value, start[name])


def test_without_a_rule_it_is_siftunes_trainer(tmp_path):
    model, trainer, _, _ = subset_run(tmp_path, None)
    plain = adapted().double()
    data, _ = ragged()
    SiftTrainer(plain, trainer.args, Collator(0), data).train()
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(model)[name])


def test_accumulation_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="leave accumulate at 1"):
        subset_run(tmp_path, Fixed(0), gradient_accumulation_steps=2)


def test_training_with_another_loss_takes_its_gradients(tmp_path):
    _, _, plain, _ = subset_run(tmp_path / "plain", None)
    _, _, steps, seen = subset_run(tmp_path / "other", None, loss="rows")
    batch, _ = seen[0]
    oracle = adapted().double()
    logits = oracle(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_p = logits.log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp_min(0)[..., None])[..., 0]
    labelled = batch["labels"][:, 1:] != -100
    (sum(-one[kept].mean() for one, kept in zip(log_p, labelled, strict=True)) / len(log_p)).backward()
    for name, parameter in oracle.named_parameters():
        if name in steps[0]:
            torch.testing.assert_close(steps[0][name], parameter.grad, rtol=1e-5, atol=1e-7)
            assert not torch.allclose(steps[0][name], plain[0][name], rtol=1e-2, atol=0)


def one_batch(count=6):
    data, rows = ragged(count)
    return Collator(0)([data[place] for place in range(count)]), rows


def losses(model, batch):
    """Mean token loss of every row, one pass each."""
    found = []
    for row in range(len(batch["labels"])):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = (batch[name][row, :length] for name in ("input_ids", "labels"))
        log_p = model(input_ids=ids[None]).logits[0].log_softmax(1)
        picked = [-log_p[t - 1, ids[t]].item() for t in range(1, length) if labels[t] != -100]
        found.append(sum(picked) / len(picked))
    return torch.tensor(found, dtype=torch.float64)


def test_excess_is_over_the_base():
    model = adapted().double()
    batch, rows = one_batch()
    ours = losses(model, batch)
    with model.disable_adapter():
        base = losses(model, batch)
    wanted = (ours - base).argsort()[:2].sort().values
    assert torch.equal(Keep("small-excess", 2)(model, batch, rows), wanted)
    assert torch.equal(Keep("small-excess", 0.34)(model, batch, rows), wanted)
    assert not torch.equal(wanted, ours.argsort()[:2].sort().values)


def test_the_ceiling_keeps_right_rows_of_the_target_and_known_ones():
    rows = [{"group": name} for name in ("wrong", "target", "arc", "known", "target")]
    assert Keep("target")(None, {}, rows).tolist() == [1, 3, 4]
    assert Keep("target")(None, {}, rows[:1]).tolist() == []


def test_an_unknown_rule_is_refused():
    with pytest.raises(RecipeError, match="no rule 'tiny-loss'"):
        Keep("tiny-loss")


def test_what_was_kept_is_counted(tmp_path):
    data = ragged(16, groups=("target", "other"))
    _, trainer, _, seen = subset_run(tmp_path, Keep("target"), data=data, max_steps=4)
    found = trainer.followed.summary(4)
    assert found["batches"] == {"target": 0.5, "other": 0.5}
    assert found["followed"] == {"target": 1.0, "other": 0.0}
    assert len(seen) == 4


def test_shares_by_quarters_and_thirds():
    """By hand: a layer in the lower and one in the upper third, in the first and in the last of eight steps."""
    rows = [{"group": "target"}, {"group": "other"}]
    counts = Followed(["target", "other"])
    counts.see(0, rows)
    counts.follow(0, 0.0, rows[:1])
    counts.follow(0, 0.9, rows, [3.0, 1.0])
    counts.follow(7, 0.0, rows[1:])
    found = counts.summary(8)
    assert found["batches"] == {"target": 0.5, "other": 0.5}
    assert found["followed"] == {"target": 0.6667, "other": 0.3333}
    assert found["quarters"] == [{"target": 0.8, "other": 0.2}, {}, {}, {"target": 0.0, "other": 1.0}]
    assert found["thirds"] == [{"target": 0.5, "other": 0.5}, {}, {"target": 0.75, "other": 0.25}]
