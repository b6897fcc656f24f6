"""Every method of siftune on the models of `support.trainers`: at its limit, and at work."""

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from support.tiny import batch
from support.trainers import adapted, rows, train, weights
from torch import Tensor
from transformers import Trainer, TrainerCallback

from siftune.engine.sharding import shard_base
from siftune.methods import METHODS, Part
from siftune.recipe.schema import Recipe
from siftune.train.build import methods_of
from siftune.train.trainer import SiftTrainer

SUPPORT_SIZE = 3  # unlike any batch, so that passes over support rows are told from others by their size


class Case(NamedTuple):
    """Settings of a part of a method.

    Attributes:
        limit: Where training is plain training, bit for bit.
        work: Where it selects, on four layers and batches of four rows, and redraws within a few steps.
    """

    limit: dict[str, Any]
    work: dict[str, Any]


# a new method has its line here: group of its settings -> its limit, and settings that select
CASES = {
    "rst": Case({"active": 1.0}, {"active": 0.5}),
    "ist": Case({"active": 1.0, "interval": 1000}, {"active": 0.5, "interval": 2, "score_batch_size": 6}),
    "gast": Case({"select": 1.0}, {"select": 2, "support_size": SUPPORT_SIZE}),
}

NAMES = [name for name, method in METHODS.items() if method.parts]  # dense is what they are compared with


def parts(name: str) -> tuple[Part, ...]:
    return METHODS[name].parts


def chooses_rows(name: str) -> bool:
    return any(part.rows for part in parts(name))


def built(name: str, case: str = "work") -> list[Any]:
    """The method's callbacks, as `siftune train` makes them, each with `all`, the choices that it will have made."""
    groups = {part.settings.group: part.settings(**getattr(CASES[part.settings.group], case)) for part in parts(name)}
    callbacks = methods_of(Recipe(method=name, **groups), None)
    for callback in callbacks:
        callback.all = []
        callback.on_select = callback.all.append
    return callbacks


def attached(stack: ExitStack, name: str, model: Any, optimizer: Any) -> list[Any]:
    """Put a method's parts on a model, each with what it takes; what `attach` returns of each."""
    given = {"batches": [batch(model, SUPPORT_SIZE, seed=7)], "optimizer": optimizer}
    return [
        stack.enter_context(method.attach(model, **{key: given[key] for key in takes(method) & given.keys()}))
        for method in built(name)
    ]


def takes(method: Any) -> set[str]:
    return set(inspect.signature(method.attach).parameters)


# what several ranks are tried with, batches of four rows on each: plainly, and with all that makes it harder
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hard": {
        "count": 22, "max_steps": 5, "gradient_accumulation_steps": 2,  # the last of three batches in an epoch is half
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
}  # fmt: skip


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None and not state.global_step:
                self.found[name] = parameter.grad.clone()


def trained(
    folder: Path, name: str, shard: bool = False, model: Any = None, **settings: Any
) -> tuple[dict[str, Any], Trainer]:
    """Train a few steps, also on several ranks: weights, gradients of the first step, layers of every step, and samples
    of every batch; there is a checkpoint after the second.

    Args:
        folder: Of the checkpoint.
        name: The method.
        shard: Divide the base among the ranks.
        model: What is trained; `adapted()` if not given.
        settings: For the Trainer, and `resume`, a checkpoint to resume from, and `also`, further callbacks.
    """
    methods, gradients, model = built(name), FirstGradients(), model or adapted()
    if shard:
        shard_base(model)
    if not methods:  # with other Trainers a method's callback sees to a sharded base
        settings["trainer"] = SiftTrainer
    steps = {"max_steps": 4, "lr_scheduler_type": "constant", "ddp_find_unused_parameters": False}
    saved = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    also = settings.pop("also", ())
    given = {"dataset": rows(settings.pop("count", 48)), **steps, **saved, **settings}
    model, trainer = train(folder, *methods, gradients, *also, model=model, **given)
    choices = [choice for method in methods for choice in method.all]
    return {
        "weights": weights(model),
        "gradients": gradients.found,
        "layers": [c.layers for c in choices if not hasattr(c, "selected")],
        "samples": {(c.step, c.batch): (c.layers, c.selected.tolist()) for c in choices if hasattr(c, "selected")},
    }, trainer
