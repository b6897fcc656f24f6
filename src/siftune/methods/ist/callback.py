"""IST and RST for any transformers Trainer, and for plain training loops.

Example:
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[IST(active=0.25)])

    with IST(active=0.25).attach(model, batches=score_loader, optimizer=optimizer):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.errors import RecipeError
from siftune.methods.batches import Batch, GivenBatches, RowDraws
from siftune.methods.callback import SelectionCallback
from siftune.methods.host_trainer import refuse_wrappers, trainer_loss
from siftune.methods.ist.maths import ISTSettings
from siftune.methods.layer_driver import LayerSelection, Loss, Selection, model_loss


class _LayerCallback(SelectionCallback):
    """What IST and RST share: a `LayerSelection` that lives as long as a training run."""

    _scored: bool

    def __init__(self, settings: ISTSettings, layers: str | None, arguments: dict[str, Any]) -> None:
        self.settings = settings
        self.layers = layers
        self._arguments = arguments
        self.on_select: Callable[[Selection], None] | None = None
        self._selection: LayerSelection | None = None
        self._resumed = None

    @property
    def last(self) -> Selection | None:
        """The choice of the current step; None before training."""
        return self._selection.last if self._selection else None

    @property
    def importance(self) -> Tensor | None:
        """(L,) float64 importance logits, high = important; None before training."""
        return self._selection.importance if self._selection else None

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints: the constructor's arguments and the selection's state."""
        selection = self._selection.state_dict() if self._selection else None
        return {"args": self._arguments, "attributes": {"_resumed": selection}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, set the gates, and continue from a checkpoint's state."""
        self.remove()
        refuse_wrappers(args)
        model = kwargs["model"]
        self._selection = LayerSelection(
            model,
            self.settings,
            scored=self._scored,
            loss=trainer_loss(self),
            layers=self.layers,
            chunk=args.per_device_train_batch_size,
        )
        loader = kwargs.get("train_dataloader")
        if loader is not None:
            draws = RowDraws(loader.dataset, loader.collate_fn, self._selection.generator)
            if self.settings.interval is not None:
                draws.check()
            self._selection.draws = draws
        self._resume(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the layers of this optimizer step."""
        assert self._selection is not None
        self._selection.steps = state.global_step
        chosen = self._selection.begin()
        if self.on_select is not None:
            self.on_select(chosen)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that the optimizer skips inactive layers."""
        assert self._selection is not None
        self._selection.drop_inactive_grads()


class IST(_LayerCallback):
    """Importance-aware Sparse Tuning: train the layers that matter (arXiv 2410.11772).

    Args:
        active: Share of the layers that train in a step.
        interval: Optimizer steps between two updates of the importance; None or infinity never updates it.
        score_batch_size: Training rows on which the candidate sets are compared.
        candidates: Candidate sets per update.
        suppressed: Share of the layers in a candidate set.
        factor: What the adapter response of a suppressed layer is multiplied by.
        score_lr: Learning rate of the importance logits.
        seed: Seed of IST's own generator.
        layers: Path of the decoder layers, where they are not found by structure.

    Raises:
        RecipeError: When a setting is out of its range.
    """

    _scored = True

    def __init__(
        self,
        active: float = 0.25,
        interval: float | None = 10,
        score_batch_size: int = 16,
        candidates: int = 3,
        suppressed: float = 0.5,
        factor: float = 0.25,
        score_lr: float = 10.0,
        seed: int = 0,
        layers: str | None = None,
    ) -> None:
        every = None if interval is None or interval == float("inf") else int(interval)
        if every is not None and every != interval:
            raise RecipeError(f"interval is {interval}; give a whole number of optimizer steps, or None.")
        settings = ISTSettings(active, every, score_batch_size, candidates, suppressed, factor, score_lr, seed)
        super().__init__(settings, layers, {**vars(settings), "layers": layers})

    def attach(
        self,
        model: nn.Module,
        *,
        batches: Iterable[Batch] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss = model_loss,
    ) -> LayerSelection:
        """Select layers in a plain training loop.

        Args:
            model: Causal LM with adapters.
            batches: Batches on which the candidate sets are compared, one each time; started again at the end.
            optimizer: Where given, its steps drive the selection; else call `step()` after each.
            loss: Loss of a batch, a scalar.

        Returns:
            A context manager; `last.layers` are the layers that train now.

        Raises:
            RecipeError: When there are no `batches` although `interval` asks for updates.
        """
        if batches is None and self.settings.interval is not None:
            raise RecipeError("IST compares layers on rows: give attach(..., batches=...), or set interval=None.")
        draws = GivenBatches(batches) if batches is not None else None
        return _started(LayerSelection(model, self.settings, draws=draws, loss=loss, layers=self.layers), optimizer)


class RST(_LayerCallback):
    """Random sparse tuning, IST's ablation: as many layers, drawn uniformly.

    Args:
        active: Share of the layers that train in a step.
        seed: Seed of RST's own generator.
        layers: Path of the decoder layers, where they are not found by structure.
    """

    _scored = False

    def __init__(self, active: float = 0.25, seed: int = 0, layers: str | None = None) -> None:
        settings = ISTSettings(active=active, interval=None, seed=seed)
        super().__init__(settings, layers, {"active": active, "seed": seed, "layers": layers})

    def attach(self, model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> LayerSelection:
        """Select layers in a plain training loop; see `IST.attach`."""
        return _started(LayerSelection(model, self.settings, scored=False, layers=self.layers), optimizer)


def _started(selection: LayerSelection, optimizer: torch.optim.Optimizer | None) -> LayerSelection:
    """Draw the first step's layers."""
    selection.begin()
    if optimizer is not None:
        selection.follow(optimizer)
    return selection
