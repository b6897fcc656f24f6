"""What all callbacks share: a selection that lives as long as a training run, and its place in checkpoints.

A callback is its method's settings, and what only a callback needs besides: a seed, and where the layers are. What it
needs of the Trainer that calls it, and is not handed, it finds among its callers.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from siftune.base.settings import Settings
from siftune.methods.drivers.batches import Batch, Loss, model_loss
from siftune.methods.host import deepspeed
from siftune.methods.host.log_lines import LogLines, Means
from siftune.methods.host.spread import average_adapters


class _Selecting(Protocol):
    def remove(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


T = TypeVar("T", bound=_Selecting)


@dataclass(eq=False, repr=False)
class SelectionCallback(Settings, TrainerCallback, ExportableState, Generic[T]):  # type: ignore[misc]
    """A callback whose selection is made when training begins, and taken off the model when it ends."""

    seed: int = 0
    layers: str | None = None
    _chooses_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the settings, and begin without a model."""
        super().__post_init__()
        self._selection: T | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._means = Means()
        self._lines = LogLines(self.group, self._figures)

    def _figures(self) -> dict[str, float]:
        """What the Trainer's log is told, since it was last."""
        return self._means.take()

    def remove(self) -> None:
        """Take everything off model and Trainer: needed only where training ended in an exception."""
        self._lines.remove()
        if self._selection is not None:
            self._selection.remove()

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints: the constructor's arguments, but for rows, and the selection's state."""
        selection = self._selection.state_dict() if self._selection else None
        arguments = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
        return {"args": arguments, "attributes": {"_resumed": selection}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the adapters of a base that is divided averaged over the ranks, or kept whole by DeepSpeed."""
        trainer = calling_trainer(self)
        if trainer is not None:
            average_adapters(trainer)
            deepspeed.prepare(trainer, self.layers, self._chooses_layers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was, but for the adapter's values."""
        self.remove()

    def _resume(self, state: TrainerState) -> bool:
        """Continue from the state in the checkpoint that the Trainer resumed from; False where there is none."""
        saved = self._resumed or saved_state(state, type(self).__name__)
        self._resumed = None
        if not state.global_step or not saved:
            return False
        assert self._selection is not None
        self._selection.load_state_dict(saved)
        return True


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper and DeepSpeed's, if it is in one."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def saved_state(state: TrainerState, name: str) -> Mapping[str, Any] | None:
    """A callback's state in the checkpoint that the Trainer resumed from."""
    saved = getattr(state, "stateful_callbacks", None) or {}
    entry = saved.get(name) if isinstance(saved, Mapping) else None
    if isinstance(entry, list):
        entry = entry[0]
    return entry["attributes"].get("_resumed") if entry else None


def trainer_loss(callback: TrainerCallback) -> Loss:
    """The loss of the Trainer that calls this callback, so that DPO and the like are scored by their own.

    Trainers do not hand themselves to callbacks; the one at work is found among the callers.
    """
    trainer = calling_trainer(callback)
    if trainer is None:
        return model_loss

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with _metrics_kept(trainer), trainer.compute_loss_context_manager():
            value: Tensor = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
        return value

    return loss


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that has called a callback; None where something else did."""
    return next((owner for owner, _ in _calls(callback)), None)


def resumed_from(callback: TrainerCallback) -> Path | None:
    """The checkpoint folder that the calling Trainer was told to resume from."""
    for _, values in _calls(callback):
        folder = values.get("resume_from_checkpoint")
        if isinstance(folder, str | Path):
            return Path(folder)
    return None


def _calls(callback: TrainerCallback) -> Iterator[tuple[Trainer, Mapping[str, Any]]]:
    """The running methods of the Trainer that has the callback, innermost first, with their local values."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            yield owner, frame.f_locals
        frame = frame.f_back


@contextmanager
def _metrics_kept(trainer: Trainer) -> Iterator[None]:
    """Keep scoring out of the metrics that TRL's trainers collect in `compute_loss`."""
    metrics: dict[str, dict[str, list[float]]] = getattr(trainer, "_metrics", None) or {}
    kept = {mode: {name: list(v) for name, v in values.items()} for mode, values in metrics.items()}
    try:
        yield
    finally:
        for mode, values in kept.items():
            metrics[mode].clear()
            metrics[mode].update(values)
