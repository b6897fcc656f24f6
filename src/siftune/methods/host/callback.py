"""Base of all callbacks: a selection for the time of a training run, its state in checkpoints, its figures in the log.

A callback is its method's settings, plus a seed and the path of the layers. The Trainer does not pass itself to
callbacks, so a callback finds it among the callers. Trackers come before a user's callbacks and read a log line first,
so `LogLines` comes before all others during training.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from siftune.base.errors import RecipeError, TrainingError
from siftune.base.settings import Settings
from siftune.base.text import one_line
from siftune.engine.gate import always
from siftune.methods.host import deepspeed
from siftune.methods.host.spread import average_adapters
from siftune.models.loss import IGNORED, Batch, Loss, model_loss, moved


class _Selecting(Protocol):
    def remove(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


T = TypeVar("T", bound=_Selecting)


class Means:
    """Means of figures between two log lines.

    Example:
        >>> means = Means()
        >>> means.note({"layers": 2.0})
        >>> means.note({"layers": 3.0})
        >>> means.take(), means.take()
        ({'layers': 2.5}, {})
    """

    def __init__(self) -> None:
        self._noted: dict[str, list[float]] = {}

    def note(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a step or batch."""
        for name, value in figures.items():
            self._noted.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The means since the last call, of the figures that were noted."""
        means = {name: sum(values) / len(values) for name, values in self._noted.items()}
        self._noted.clear()
        return means


class LogLines(TrainerCallback):  # type: ignore[misc]
    """Adds figures to a Trainer's log lines on training, under a group: `gast/followed`."""

    def __init__(self, group: str, figures: Callable[[], Mapping[str, float]]) -> None:
        self._group = group
        self._figures = figures
        self._trainer: Trainer | None = None

    def begin(self, trainer: Trainer | None) -> None:
        """Join a Trainer before its other callbacks; None: log nothing."""
        self.remove()
        self._trainer = trainer
        if trainer is not None:
            stand_first(trainer, self)

    def remove(self) -> None:
        """Leave the Trainer; a second call has no effect."""
        if self._trainer is not None:
            handler = self._trainer.callback_handler
            handler.callbacks = [one for one in handler.callbacks if one is not self]
            self._trainer = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Extend a line, and its copy in the Trainer's history."""
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" not in logs:
            return
        figures = {f"{self._group}/{name}": float(f"{value:.6g}") for name, value in self._figures().items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


def stand_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Put a callback before all others of a Trainer, whether or not it is there already.

    The Trainer gets a new list, since it may be iterating over the old one.
    """
    others = [one for one in trainer.callback_handler.callbacks if one is not callback]
    trainer.callback_handler.callbacks = [callback, *others]


@dataclass(eq=False, repr=False)
class SelectionCallback(Settings, TrainerCallback, ExportableState, Generic[T]):  # type: ignore[misc]
    """A callback whose selection begins and ends with training."""

    seed: int = 0
    layers: str | None = None
    _chooses_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._selection: T | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._guarded: list[tuple[Trainer, str]] = []
        self._means = Means()
        self._lines = LogLines(self.group, self._figures)

    def _figures(self) -> dict[str, float]:
        """Figures for the Trainer's log since its last line."""
        return self._means.take()

    def remove(self) -> None:
        """Remove all hooks from model and Trainer.

        After an exception in training they remove themselves as soon as the model trains again.
        """
        self._lines.remove()
        for trainer, name in self._guarded:
            vars(trainer).pop(name, None)
        self._guarded.clear()
        if self._selection is not None:
            self._selection.remove()

    def _guard(self, trainer: Trainer | None) -> None:
        """Restore the model if Ctrl-C ends a pass: torch runs the hooks that end it only after an `Exception`."""
        for name in () if trainer is None else ("compute_loss", "prediction_step"):
            if name not in vars(trainer):  # else an earlier callback does so for all
                setattr(trainer, name, _restoring(trainer, getattr(trainer, name)))
                self._guarded.append((trainer, name))

    @property
    def _begun(self) -> T:
        """The selection of this training."""
        if self._selection is None:
            raise RecipeError(f"{type(self).__name__} joined a training that was running: add it before train()")
        return self._selection

    def _clear(self) -> None:
        """Remove the hooks that an interrupted training left, before this callback and those after it set new ones."""
        self.remove()
        self._means = Means()
        trainer = calling_trainer(self)
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        for other in callbacks[callbacks.index(self) + 1 :] if callbacks else []:
            if isinstance(other, SelectionCallback):
                other.remove()

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints: arguments except rows and functions, and the selection's state."""
        selection = self._selection.state_dict() if self._selection else None
        arguments = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
        return {"args": arguments, "attributes": {"_resumed": selection}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Average the adapters of a sharded base over the ranks, or have DeepSpeed keep them unsharded."""
        trainer = calling_trainer(self)
        if trainer is not None:
            average_adapters(trainer)
            deepspeed.prepare(trainer, self.layers, self._chooses_layers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the model, except for the adapter's values."""
        self.remove()

    def _resume(self, state: TrainerState) -> bool:
        """Continue from the state in the Trainer's checkpoint; False without one."""
        saved = self._resumed or saved_state(state, type(self).__name__)
        self._resumed = None
        if not state.global_step or not saved:
            return False
        assert self._selection is not None
        try:
            self._selection.load_state_dict(saved)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise _unreadable(type(self).__name__, error) from error
        return True


def _restoring(trainer: Trainer, run: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a Trainer that removes the hooks of all selection callbacks if Ctrl-C ends it."""

    @wraps(run)
    def restoring(*args: Any, **kwargs: Any) -> Any:
        with restored_on_interrupt(trainer):
            return run(*args, **kwargs)

    return restoring


@contextmanager
def restored_on_interrupt(trainer: Trainer | None) -> Iterator[None]:
    """Remove the hooks of a Trainer's selection callbacks if Ctrl-C ends the block, whose parameters may be swapped."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        for callback in [] if trainer is None else trainer.callback_handler.callbacks:
            if isinstance(callback, SelectionCallback):
                callback.remove()
        raise


def optimizer_to_training(optimizer: Any) -> None:
    """Have an optimizer that averages weights put those that train into the model, as the Trainer does, but later."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()


def rows_of_pass(args: TrainingArguments, trainer: Trainer | None) -> int:
    """Rows in a forward pass of a rank; fewer than in `args` once `auto_find_batch_size` has reduced them."""
    return int(args.per_device_train_batch_size if trainer is None else trainer._train_batch_size)


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's or DeepSpeed's wrapper, if there is one."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def around_steps(
    optimizer: torch.optim.Optimizer, before: Callable[[], Any], after: Callable[[], Any]
) -> Sequence[Any]:
    """Call `before` when the gradients of a step are complete, and `after` when it is done.

    With a closure, the gradients are made within the step; `before` then comes at the closure's end.

    Returns:
        Handles with `remove()`.
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**dict(zip(("self", "closure"), args, strict=False)), **kwargs}
        if (closure := arguments.pop("closure", None)) is None:
            before()
            return None

        def with_before() -> Any:
            loss = closure()
            before()
            return loss

        return (arguments.pop("self"), *args[2:]), {**arguments, "closure": with_before}

    return [optimizer.register_step_pre_hook(hook), optimizer.register_step_post_hook(lambda *_: after())]


def saved_state(state: TrainerState, name: str) -> Mapping[str, Any] | None:
    """A callback's state in the checkpoint from which the Trainer resumes.

    Raises:
        TrainingError: It is of another form.
    """
    saved = getattr(state, "stateful_callbacks", None) or {}
    entry = saved.get(name) if isinstance(saved, Mapping) else None
    try:
        if isinstance(entry, list):
            entry = entry[0]
        found: Mapping[str, Any] | None = entry["attributes"]["_resumed"] if entry else None
        if not isinstance(found, Mapping | None):
            raise TypeError(f"it is {type(found).__name__}")
    except (LookupError, TypeError) as error:
        raise _unreadable(name, error) from error
    return found


def _unreadable(name: str, error: Exception) -> TrainingError:
    return TrainingError(
        f"the state of {name} in the checkpoint cannot be read ({one_line(str(error))}): resume from another "
        "checkpoint, or train in another folder"
    )


def trainer_loss(callback: TrainerCallback) -> Loss:
    """The loss of the Trainer that calls this callback, so that DPO and others are scored by their own loss."""
    trainer = calling_trainer(callback)
    if trainer is None:
        return model_loss

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with _metrics_unchanged(trainer), trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(moved(batch, trainer.args.device))
            items = {}
            counts = trainer.compute_loss_func is not None or trainer.model_accepts_loss_kwargs
            if counts and "labels" in batch:  # in these cases the Trainer passes the number of labels
                shifts = "shift_labels" not in batch and getattr(trainer, "_loss_shifts_labels", False)
                labels = batch.get("shift_labels", batch["labels"])[..., int(shifts) :]
                count = int((labels != IGNORED).sum())  # rows are drawn on the CPU: no device waits
                ranks = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
                items["num_items_in_batch"] = count * ranks  # the Trainer multiplies the loss by the ranks
            value: Tensor = trainer.compute_loss(model, inputs, **items)
        return value

    return loss


def loss_scale(trainer: Trainer | None) -> float:
    """The factor of a Trainer's losses in float16; 1 without a scaler, which accelerate makes."""
    scaler = None if trainer is None else trainer.accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())


def while_training(trainer: Trainer | None) -> Callable[[], bool]:
    """Whether a Trainer is still at work: its training ends without an event if an exception ends it."""

    def on_stack(named: str | None) -> bool:
        frame = inspect.currentframe()
        while frame is not None:
            # local values cost microseconds, so the name comes first
            if named in (None, frame.f_code.co_name) and frame.f_locals.get("self") is trainer:
                return True
            frame = frame.f_back
        return False

    # other libraries put loops of their own in the place of `train`
    return always if trainer is None else lambda: on_stack("train") or on_stack(None)


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that calls a callback; None for any other caller."""
    return next((owner for owner, _ in _calls(callback)), None)


def resumed_from(callback: TrainerCallback) -> Path | None:
    """The checkpoint folder from which the calling Trainer resumes."""
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
def _metrics_unchanged(trainer: Trainer) -> Iterator[None]:
    """Keep scoring out of the metrics and tokens that TRL's trainers collect in `compute_loss`."""
    tokens = getattr(trainer, "_total_train_tokens", None)
    every: list[dict[str, dict[str, list[float]]]] = [
        metrics for name in ("_metrics", "_stored_metrics") if (metrics := getattr(trainer, name, None)) is not None
    ]
    before = [
        {mode: {name: list(v) for name, v in values.items()} for mode, values in metrics.items()} for metrics in every
    ]
    try:
        yield
    finally:
        for metrics, saved in zip(every, before, strict=True):
            for mode, values in metrics.items():
                values.clear()
                values.update(saved.get(mode, {}))
        if tokens is not None:
            trainer._total_train_tokens = tokens
