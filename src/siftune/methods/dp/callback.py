"""Differential privacy in siftune's own Trainer: its rows, its clipping, its noise, and its place in checkpoints.

It is not a public callback. Another Trainer shuffles rows instead of drawing them, and its loss is a mean over the
tokens of a batch, in which rows depend on each other. A callback can change neither, so there would be no guarantee.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from siftune.base.errors import RecipeError, TrainingError
from siftune.methods.dp.accounting import Mechanism, spent
from siftune.methods.dp.driver import PrivateGradients
from siftune.methods.dp.sampling import PoissonBatches, collate_any, parts
from siftune.methods.dp.secret import Secret
from siftune.methods.host.callback import LogLines, calling_trainer, plain_optimizer, saved_state
from siftune.methods.host.spread import refuse_wrappers


class DP(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Private training with at most `most` rows per pass; it comes after callbacks that choose layers."""

    def __init__(self, mechanism: Mechanism, most: int, secret: Secret | None = None) -> None:
        self.mechanism = mechanism
        self._most = most
        self._secret = secret or Secret()
        self._gradients: PrivateGradients | None = None
        self._steps = 0
        self._lines = LogLines("dp", self._figures)

    def _figures(self) -> dict[str, float]:
        """ε so far, for the log; nothing if the accountant fails, as with almost no noise."""
        try:
            return {"epsilon": spent(self.mechanism, self._steps)}
        except (MemoryError, OverflowError, RuntimeError, ValueError):
            return {}

    def loader(self, dataset: Any, collate: Callable[[list[Any]], Mapping[str, Tensor]]) -> DataLoader[Any]:
        """Batches of complete steps with independently drawn rows; a batch may be empty."""
        batches = PoissonBatches(len(dataset), self.mechanism.rate, self._secret)
        return DataLoader(dataset, batch_sampler=batches, collate_fn=partial(collate_any, collate, dataset))

    def parts(self, batch: Mapping[str, Tensor]) -> Sequence[dict[str, Tensor]]:
        """A step's batch, split into forward passes."""
        return parts(batch, self._most)

    def release(self, step: int) -> None:
        """Add noise to a step's gradients; see `PrivateGradients.release`."""
        assert self._gradients is not None
        self._gradients.release(step)

    def remove(self) -> None:
        """Remove all hooks from model and Trainer; needed only after an exception in training."""
        self._lines.remove()
        if self._gradients is not None:
            self._gradients.remove()

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints: the mechanism, which a resumed run must share; not the secret."""
        return {"args": {}, "attributes": {"_resumed": asdict(self.mechanism)}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to clip, and seed torch's own generators; see `Secret.seed_dropout`."""
        self.remove()
        refuse_wrappers(args, kwargs["model"])
        if state.global_step:
            _refuse_other(saved_state(state, type(self).__name__), asdict(self.mechanism))
        self._gradients = PrivateGradients(kwargs["model"], self.mechanism, self._secret)
        _refuse_others(plain_optimizer(kwargs["optimizer"]), self._gradients)
        self._secret.seed_dropout(state.global_step)
        self._lines.begin(calling_trainer(self))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the steps, for ε in the log."""
        self._steps = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the model, except for the trained values."""
        self.remove()


def _refuse_others(optimizer: torch.optim.Optimizer, gradients: PrivateGradients) -> None:
    """Refuse an optimizer of other parameters, such as one from before the adapters were there (opacus#820).

    It would train nothing, or move parameters by gradients without noise.
    """
    private = {id(p) for group in gradients.groups for p in group.parameters.values()}
    if {id(p) for group in optimizer.param_groups for p in group["params"]} != private:
        raise TrainingError(
            "the optimizer does not have exactly the parameters that get private gradients: make it after the adapters"
        )


def _refuse_other(saved: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> None:
    """Refuse to continue a run with another mechanism: ε would hold for neither."""
    if saved is None:
        raise RecipeError(
            "the checkpoint is of a run without dp_epsilon, whose steps had no noise and no ε: train in another folder "
            "with --out, or resume without dp_epsilon"
        )
    for name, value in asked.items():
        if saved.get(name) != value:
            raise RecipeError(
                f"the checkpoint is of a private run with {name} = {saved.get(name)}, but this one has {value}, and ε "
                "requires equal steps: resume with the settings of that run, including steps and rows, or train in "
                "another folder with --out"
            )
