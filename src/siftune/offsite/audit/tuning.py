"""Fine-tune a model of an audit for a while: by siftune's own training path, and without a trace afterwards."""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.models.layers import find_layers
from siftune.models.modules import flags_restored
from siftune.offsite.audit.models import restored
from siftune.offsite.audit.settings import AuditSettings
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.train.build import build
from siftune.train.callbacks import StepProgress

Steps = Callable[[int, int], None]  # optimizer steps done, of how many


@dataclass(frozen=True)
class Tuning:
    """What every model of an audit is tuned with."""

    data: Dataset  # rows to tune on, as `tokenize_rows` makes them
    tokenizer: PreTrainedTokenizerBase
    settings: AuditSettings


@contextmanager
def tuned(
    model: nn.Module, layers: Sequence[int], tuning: Tuning, lr: float | None = None, steps: Steps | None = None
) -> Iterator[None]:
    """Fine-tune the weights of some decoder layers, and put everything back afterwards, bit for bit.

    Inside the block the model is in eval mode. Global generators are left as they were.

    Args:
        model: The model, tuned in place.
        layers: Numbers of the layers whose weights train.
        tuning: Rows and settings.
        lr: Peak learning rate; None for that of the settings.
        steps: Told of every optimizer step.

    Raises:
        TrainingError: A loss or gradient is not finite.
    """
    with restored(model, _tensors_of(model, layers)), flags_restored(model):
        with _generators_restored():
            _fine_tune(model, _recipe(tuning.settings, layers, lr), tuning, steps)
        model.eval()
        yield


def _fine_tune(model: nn.Module, recipe: Recipe, tuning: Tuning, steps: Steps | None) -> None:
    with tempfile.TemporaryDirectory(prefix="siftune-audit-") as folder:
        told = [] if steps is None else [StepProgress(steps)]
        built = build(recipe, model, tuning.tokenizer, {"train": tuning.data}, Path(folder), told, bad_steps=0)
        try:
            if steps is not None:
                steps(0, tuning.settings.steps)
            built.trainer.train()
        finally:
            built.release()


def _tensors_of(model: nn.Module, layers: Sequence[int]) -> set[str]:
    """Names in the state dict of all that may change."""
    path = find_layers(model).path
    return {name for name in model.state_dict() if name.startswith(tuple(f"{path}.{number}." for number in layers))}


def _recipe(settings: AuditSettings, layers: Sequence[int], lr: float | None) -> Recipe:
    """The settings in a recipe's words."""
    return resolve_recipe(
        Recipe(
            method="dense",
            adapter="full",
            layers=tuple(layers),
            steps=settings.steps,
            lr=settings.lr if lr is None else lr,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            seed=settings.seed,
            log_every=settings.steps,
            out="unused",
        )
    )


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Training seeds the global generators; an audit is called from the user's own program."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
