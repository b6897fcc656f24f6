"""The models of an audit: read from, changed and fine-tuned temporarily.

Both models are in memory once. The outer layers' tensors are swapped in and out in place, tuning is siftune's own
training path, and afterwards every tensor is restored bit for bit.
"""

import random
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.errors import KitError
from siftune.models.layers import find_layers
from siftune.models.modules import flags_restored
from siftune.offsite.audits.settings import AuditSettings
from siftune.offsite.emulator.model import Split, outer_names
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.train.build import build
from siftune.train.callbacks import StepProgress
from siftune.train.guards.non_finite import BrokenSteps

_ROUNDING = 2**-7  # a little more than bfloat16 loses


@dataclass(frozen=True)
class OffsiteModels:
    """A base model and an emulator of it.

    Attributes:
        base: The base model, without PEFT around it.
        emulator: The emulator; it may share tensors with the base.
        split: The split of both.
        tokenizer: The tokenizer of both.
    """

    base: PreTrainedModel
    emulator: PreTrainedModel
    split: Split
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class ParameterShares:
    """Fractions of the base's parameters that an emulator has; shared ones are counted once."""

    middle: float  # of the layers between the outer ones
    whole: float  # of the whole model


def check_models(models: OffsiteModels) -> None:
    """Check that base and emulator belong together.

    Their outer layers must be equal up to the rounding of half precision, in which a kit may be stored.

    Raises:
        KitError: The emulator's outer layers are not the base's.
        LayerError: The split does not fit.
    """
    for model in (models.base, models.emulator):
        models.split.middle(len(find_layers(model).layers))  # refuses a split that leaves no middle
    base, emulator = (read_outer(model, models.split) for model in (models.base, models.emulator))
    for name in sorted(base.keys() | emulator.keys()):
        if name not in base or name not in emulator or not _is_near(base[name], emulator[name]):
            raise KitError(f"the emulator's tensor {name} is not the base model's: give the base that it was made of")


def read_outer(model: nn.Module, split: Split) -> dict[str, Tensor]:
    """Copies of the outer layers' tensors by neutral name (see `emulator.model.outer_names`)."""
    state = model.state_dict()
    return {neutral: state[name].detach().clone() for neutral, name in outer_names(model, split).items()}


@contextmanager
def restored(model: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """Put a model's tensors, those of these names or all, back afterwards, bit for bit and in place."""
    before = {name: t.detach().clone() for name, t in model.state_dict().items() if names is None or name in names}
    try:
        yield
    finally:
        _write(model, before)


@contextmanager
def plugged(model: nn.Module, split: Split, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put outer layers, by neutral name, into a base model or an emulator for a while; they are cast to its dtype."""
    names = outer_names(model, split)
    with restored(model, names.values()):
        _write(model, {names[neutral]: tensor for neutral, tensor in tensors.items()})
        yield


def on_accelerator(models: OffsiteModels) -> OffsiteModels:
    """Move the models to the accelerator if there is one."""
    if not torch.accelerator.is_available():
        return models
    device: Any = torch.accelerator.current_accelerator()
    return replace(models, base=models.base.to(device), emulator=models.emulator.to(device))


def parameter_shares(base: nn.Module, emulator: nn.Module, split: Split) -> ParameterShares:
    """Count parameters."""
    middle = count(_middle(emulator, split)) / count(_middle(base, split))
    return ParameterShares(middle, count(emulator) / count(base))


def count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _middle(model: nn.Module, split: Split) -> nn.ModuleList:
    layers = find_layers(model).layers
    return nn.ModuleList(layers[number] for number in split.middle(len(layers)))


def _write(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _is_near(tensor: Tensor, other: Tensor) -> bool:
    if tensor.shape != other.shape:
        return False
    return torch.allclose(tensor.float(), other.to(tensor.device).float(), rtol=_ROUNDING, atol=1e-6)


Steps = Callable[[int, int], None]  # optimizer steps done, of how many


@dataclass(frozen=True)
class Tuning:
    """Rows and settings of the tunings of an audit."""

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
        steps: Called for every optimizer step.

    Raises:
        TrainingError: A loss or gradient is not finite.
    """
    path = find_layers(model).path
    prefixes = tuple(f"{path}.{number}." for number in layers)
    changing = {name for name in model.state_dict() if name.startswith(prefixes)}
    with restored(model, changing), flags_restored(model):
        with _generators_restored():
            _fine_tune(model, _recipe(tuning.settings, layers, lr), tuning, steps)
        model.eval()
        yield


def _fine_tune(model: nn.Module, recipe: Recipe, tuning: Tuning, steps: Steps | None) -> None:
    with tempfile.TemporaryDirectory(prefix="siftune-audit-") as folder:
        callbacks = [] if steps is None else [StepProgress(steps)]
        built = build(recipe, model, tuning.tokenizer, {"train": tuning.data}, Path(folder), callbacks, BrokenSteps(0))
        try:
            if steps is not None:
                steps(0, tuning.settings.steps)
            built.trainer.train()
        finally:
            built.release()


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
