"""What the callbacks share: a selection that lives as long as a training run, and its place in checkpoints."""

from collections.abc import Mapping
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from siftune.methods.host_trainer import saved_state


class _Selecting(Protocol):
    def remove(self) -> None: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class SelectionCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """A callback whose selection is made when training begins, and taken off the model when it ends."""

    _selection: _Selecting | None
    _resumed: Mapping[str, Any] | None

    def remove(self) -> None:
        """Take everything off the model: needed only where training ended in an exception."""
        if self._selection is not None:
            self._selection.remove()

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
