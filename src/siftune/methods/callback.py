"""What all callbacks share: a selection that lives as long as a training run, and its place in checkpoints.

A callback is its method's settings, and what only a callback needs besides: a seed, and where the layers are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from siftune.methods.host_trainer import saved_state
from siftune.settings import Settings


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

    def __post_init__(self) -> None:
        """Check the settings, and begin without a model."""
        super().__post_init__()
        self._selection: T | None = None
        self._resumed: Mapping[str, Any] | None = None

    def remove(self) -> None:
        """Take everything off the model: needed only where training ended in an exception."""
        if self._selection is not None:
            self._selection.remove()

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints: the constructor's arguments, but for rows, and the selection's state."""
        selection = self._selection.state_dict() if self._selection else None
        arguments = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
        return {"args": arguments, "attributes": {"_resumed": selection}}

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
    """The optimizer inside accelerate's wrapper, if it is in one."""
    return getattr(optimizer, "optimizer", optimizer)
