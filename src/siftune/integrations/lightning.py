"""Lightning: the methods as a callback of its Trainer, steps and checkpoints included."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from siftune.base.errors import ModelError, RecipeError, UnsupportedError
from siftune.methods.drivers.batches import RowDraws
from siftune.methods.ist.callback import IST
from siftune.models.loss import Batch, Loss, model_loss

_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


class Sift(Callback):  # type: ignore[misc]
    """A method for Lightning's Trainer: attached when training starts, advanced by optimizer steps, removed at the end.

    The model is the outermost transformers or PEFT model in the LightningModule. `training_step` must call it with
    complete rows and train on its loss. The method's state and generator are saved in Lightning's checkpoints.

    Args:
        method: `GAST(...)`, `IST(...)` or another of the methods.
        batches: Rows that the method compares with, as for `attach`. By default they are drawn from the training rows
            with the loader's collator, whose batches must be arguments of the model.
        loss: Loss of such a batch, a scalar; by default the model's own.

    Attributes:
        selection: What `method.attach` returned: `selection.last` is the current choice; None before training.

    Raises:
        RecipeError: The method cannot be attached, or there is not exactly one optimizer.
        ModelError: There is no transformers model in the LightningModule.
        UnsupportedError: The strategy shards parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> sift = Sift(GAST(select=0.75, support="rest"))
        >>> Trainer(max_steps=2, callbacks=[sift], **quiet).fit(module, loader)
        >>> sift.selection.last.selected.shape  # four layers, three of four rows
        torch.Size([4, 3])
    """

    def __init__(self, method: Any, batches: Iterable[Batch] | None = None, loss: Loss = model_loss) -> None:
        if not hasattr(method, "attach"):
            raise RecipeError(f"Sift takes a method, and {type(method).__name__} is none")
        self.method = method
        self.batches = batches
        self.loss = loss
        self.selection: Any = None
        self._resumed: Mapping[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints: one for each method."""
        return f"siftune.{type(self.method).__name__}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a state that was loaded for another call, as by `test`."""
        self._resumed = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the method, and continue from a checkpoint's state."""
        self._remove()
        _refuse_sharding(trainer)
        names = inspect.signature(self.method.attach).parameters
        arguments = {"optimizer": _optimizer(trainer), "batches": self.batches, "loss": self.loss}
        draws = self.batches is None and "batches" in names and _by_training_rows(self.method)
        if draws:
            arguments["batches"] = ()
        options = {name: value for name, value in arguments.items() if name in names}
        self.selection = self.method.attach(_language_model(pl_module), **options)
        if draws:
            self.selection.draws = RowDraws.of_loader(
                trainer.train_dataloader, self.selection.generator, "give Sift(..., batches=...)"
            )
        if self._resumed is not None:
            _load(self.selection, self._resumed)
            self._resumed = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the method."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the method."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoints, between two optimizer steps."""
        if self.selection is None:
            return {}
        means = self.selection.mean_tensors() if hasattr(self.selection, "mean_tensors") else {}
        return {"selection": self.selection.state_dict(), "means": means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        self._resumed = state_dict or None

    def _remove(self) -> None:
        if self.selection is not None:
            self.selection.remove()


def _by_training_rows(method: Any) -> bool:
    """Whether a method compares with rows of the training set by default."""
    source: str | None = getattr(method, "support_source", None)
    return source == "sample" or isinstance(method, IST)


def _load(selection: Any, state: Mapping[str, Any]) -> None:
    selection.load_state_dict(state["selection"])
    if state["means"]:
        selection.load_mean_tensors(state["means"])


def _language_model(module: nn.Module) -> nn.Module:
    """The outermost model of transformers or PEFT."""
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel | PeftModel):
            model: nn.Module = inner
            return model
    raise ModelError(
        f"{type(module).__name__} holds no transformers or PEFT model: keep one as an attribute, as in "
        "self.model = get_peft_model(...)"
    )


def _optimizer(trainer: Trainer) -> Any:
    if len(trainer.optimizers) != 1:
        raise RecipeError(f"Sift follows the steps of one optimizer, and there are {len(trainer.optimizers)}")
    return trainer.optimizers[0]


def _refuse_sharding(trainer: Trainer) -> None:
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if kinds & _SHARDING:
        raise UnsupportedError(
            f"{type(trainer.strategy).__name__} shards the adapters that selection works on: use one device, or DDP, "
            "since adapters are small enough to be replicated"
        )
