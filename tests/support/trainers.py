"""Trainers on tiny models, for the tests of callbacks."""

import torch
from datasets import Dataset
from support.tiny import VOCAB, tiny
from transformers import Trainer, TrainerCallback, TrainingArguments

from siftune.base.ranks import leave_launch, let_go
from siftune.models.adapters.attach import attach_adapter

ROWS = 24


def adapted(family="llama", layers=4, seed=1, vocab_size=VOCAB, base=None, **settings):
    """A tiny model, or another base, with LoRA or another adapter, in the same state every time.

    B is drawn, too, so that adapters respond from the start.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = attach_adapter(base or tiny(family, layers, vocab_size=vocab_size), **{"rank": 2, **settings})
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "bottleneck_up" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows(count=ROWS, length=8, seed=0):
    """Random token rows, the first two tokens without label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, length), generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    )


def arguments(folder, kind=TrainingArguments, **settings):
    """Arguments of a short, quiet run on the CPU."""
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
        "seed": 3,
    }  # fmt: skip
    return kind(**{**defaults, **settings})


class Watch(TrainerCallback):
    """Records, for every optimizer step, which parameters had gradients and which changed."""

    def __init__(self, model):
        self.model = model
        self.with_grad, self.changed = [], []

    def _values(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def on_pre_optimizer_step(self, *_, **__):
        self._before = self._values()
        self.with_grad.append({n for n, p in self.model.named_parameters() if p.grad is not None})

    def on_optimizer_step(self, *_, **__):
        after = self._values()
        self.changed.append({name for name, value in after.items() if not torch.equal(value, self._before[name])})


def weights(model):
    """Copies of all trainable values."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(folder, *callbacks, model=None, dataset=None, resume=None, trainer=Trainer, collator=None, **settings):
    """Train a tiny model; returns the model and its Trainer."""
    model = model if model is not None else adapted()
    worker = trainer(
        model, arguments(folder, **settings), train_dataset=dataset or rows(), data_collator=collator,
        callbacks=[Watch(model), *callbacks],
    )  # fmt: skip
    worker.train(resume_from_checkpoint=resume)
    return model, worker


class At(TrainerCallback):
    """Does something at an event of a step, counted from 1."""

    def __init__(self, event, step, act):
        self.step, self.act = step, act
        setattr(self, event, self._act)

    def _act(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.act(kwargs["model"])


def stop(_):
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def leave(trainer):
    """End a rank's process group; gloo's threads that outlive it abort the process."""
    let_go(trainer)
    leave_launch()
