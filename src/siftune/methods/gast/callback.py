"""GAST for any transformers Trainer, and for plain training loops.

Example:
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[GAST(select=0.75)])

    with GAST(select=8, support="rest").attach(model) as sift:
        model(**batch).loss.backward()
        sift.last.scores      # (layers, samples) float32
        sift.last.selected    # (layers, K) int64
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from siftune.errors import RecipeError, UnsupportedError
from siftune.methods.batches import Batch, GivenBatches, RowDraws
from siftune.methods.callback import SelectionCallback
from siftune.methods.gast.choice import Samples
from siftune.methods.gast.driver import SampleSelection
from siftune.methods.gast.maths import Choice, GASTSettings, Pool, Scale, Score, Support
from siftune.methods.host_trainer import calling_trainer, refuse_wrappers, resumed_from, trainer_loss
from siftune.methods.layer_driver import Loss, model_loss

logger = logging.getLogger(__name__)

_MEAN = "gast_mean.safetensors"  # in a checkpoint: the running mean of support="momentum"


class GAST(SelectionCallback):
    """Gradient-aligned Sparse Tuning: every layer follows the samples that point its way (arXiv 2603.09865).

    Scores and choices are made per forward pass: with gradient accumulation in each micro-batch, with several ranks in
    each rank's part of the batch. Parameters outside of the decoder layers follow all samples.

    Args:
        select: Samples that a layer follows in a batch: a count (int), or a share of the batch (float; the paper's
            is 0.5).
        support: What gradients are compared with: "sample", rows drawn from the training set in each optimizer step
            (the paper's; one more forward and backward pass over them); "rest", the other samples of the batch;
            "momentum", a running mean of earlier gradients; "dataset", rows drawn from `support_set`.
        support_size: Rows in the support set of "sample" and "dataset".
        support_set: Rows for "dataset", prepared as the Trainer's training rows are when they reach its collator.
        choice: "stochastic" (the paper's), "topk" or "random".
        score: "inner" (the paper's), "cosine", or "preconditioned", the inner product in Adam's metric.
        pool: One choice per "layer" or per adapted "module".
        scale: Factor B/K on the sum over the chosen samples ("mean"), or none ("sum").
        replacement: Draw with replacement.
        temperature: Of the softmax over z-scores; high draws more evenly.
        decay: Of the running mean of "momentum", per optimizer step.
        select_after: Optimizer steps at the start in which every sample is followed.
        seed: Seed of GAST's own generator.
        pairs: Row i and row i + B/2 are one sample, as TRL's preference trainers lay them out; None: found out from the
            Trainer's collator.
        keep: Keep the choices of all batches in `history`.
        layers: Path of the decoder layers, where they are not found by structure.

    Attributes:
        history: The choices of all batches, where `keep` is set.
        on_select: Called with each batch's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.
    """

    def __init__(
        self,
        select: int | float = 0.75,
        support: Support = "sample",
        support_size: int = 4,
        support_set: Any = None,
        choice: Choice = "stochastic",
        score: Score = "inner",
        pool: Pool = "layer",
        scale: Scale = "mean",
        replacement: bool = False,
        temperature: float = 1.0,
        decay: float = 0.9,
        select_after: int = 0,
        seed: int = 0,
        pairs: bool | None = None,
        keep: bool = False,
        layers: str | None = None,
    ) -> None:
        self.settings = GASTSettings(
            select,
            support,
            support_size,
            choice,
            score,
            pool,
            scale,
            replacement,
            temperature,
            decay,
            select_after,
            seed,
        )
        self.support_set = support_set
        self.pairs = pairs
        self.keep = keep
        self.layers = layers
        self.history: list[Samples] = []
        self.on_select: Callable[[Samples], None] | None = None
        self._selection: SampleSelection | None = None
        self._resumed = None

    @property
    def last(self) -> Samples | None:
        """The choice in the last batch; None before training."""
        return self._selection.last if self._selection else None

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints: the constructor's arguments, but for rows, and the selection's state."""
        selection = self._selection.state_dict() if self._selection else None
        arguments = {**vars(self.settings), "pairs": self.pairs, "keep": self.keep, "layers": self.layers}
        return {"args": arguments, "attributes": {"_resumed": selection}}

    def attach(
        self,
        model: nn.Module,
        *,
        batches: Iterable[Batch] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss = model_loss,
    ) -> SampleSelection:
        """Select samples in a plain training loop.

        Args:
            model: Causal LM with adapters.
            batches: Support sets for "sample" and "dataset", one each step; started again at the end.
            optimizer: Where given, its steps drive the selection; else call `end()` before and `step()` after each.
                "rest" needs neither. "preconditioned" takes its metric.
            loss: Loss of a support batch, a scalar.

        Returns:
            A context manager; `last` is the choice in the last batch that went backward.

        Raises:
            RecipeError: When `batches` or `optimizer` are missing and needed.
        """
        if batches is None and self.settings.needs_rows:
            raise RecipeError(
                f'support="{self.settings.support}" compares with rows: give attach(..., batches=...), or set '
                'support="rest" or "momentum".'
            )
        if optimizer is None and self.settings.score == "preconditioned":
            raise RecipeError('score="preconditioned" takes Adam\'s metric: give attach(..., optimizer=...).')
        draws = GivenBatches(batches) if batches is not None else None
        selection = SampleSelection(
            model, self.settings, draws=draws, loss=loss, optimizer=optimizer, layers=self.layers,
            pairs=bool(self.pairs),
        )  # fmt: skip
        if optimizer is not None:
            selection.follow(optimizer)
        return selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, set the tape, and continue from a checkpoint's state."""
        self.remove()
        refuse_wrappers(args)
        loader, trainer = kwargs.get("train_dataloader"), calling_trainer(self)
        collate = getattr(loader, "collate_fn", None)
        _refuse_packing(args, collate)
        optimizer = kwargs.get("optimizer")
        self._selection = SampleSelection(
            kwargs["model"],
            self.settings,
            loss=trainer_loss(self),
            optimizer=getattr(optimizer, "optimizer", optimizer),
            layers=self.layers,
            chunk=args.per_device_train_batch_size,
            pairs=_are_pairs(trainer, collate) if self.pairs is None else self.pairs,
            compiled=bool(args.torch_compile),
        )
        if self.settings.needs_rows:
            draws = RowDraws(self._support_rows(loader), collate, self._selection.generator)  # type: ignore[arg-type]
            draws.check()
            self._selection.draws = draws
        if self._resume(state) and state.global_step > self.settings.select_after:  # before, there is no mean yet
            self._load_mean()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the support set of this optimizer step."""
        assert self._selection is not None
        if self.settings.needs_rows:  # the Trainer does so before each batch, but after this
            kwargs["model"].train()
        self._selection.steps = state.global_step
        self._selection.begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand out the choice of a micro-batch."""
        self._tell()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand out the choice of the step's last batch, and move the running mean."""
        assert self._selection is not None
        self._tell()
        self._selection.end()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the running mean into the checkpoint."""
        assert self._selection is not None
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        tensors = self._selection.mean_tensors()
        if tensors and state.is_world_process_zero and folder.is_dir():
            save_file({name: mean.contiguous() for name, mean in tensors.items()}, folder / _MEAN)

    def _tell(self) -> None:
        choice = self.last
        if choice is None:
            return
        if self.keep:
            self.history.append(choice)
        if self.on_select is not None:
            self.on_select(choice)

    def _support_rows(self, loader: Any) -> Any:
        if self.settings.support == "sample":
            return loader.dataset
        if self.support_set is None:
            raise RecipeError(
                'support="dataset" needs rows: give GAST(support_set=...), prepared as the training rows are. Where '
                "they were given, restore_callback_states_from_checkpoint has lost them: leave it off, GAST reads its "
                "state from the checkpoint in any case."
            )
        return self.support_set

    def _load_mean(self) -> None:
        """Read the running mean of "momentum" from the checkpoint."""
        assert self._selection is not None
        if self.settings.support != "momentum" or not self.settings.needs_scores:
            return
        folder = resumed_from(self)
        if folder is None or not (folder / _MEAN).is_file():
            raise RecipeError(
                f"the checkpoint {folder or ''} has no {_MEAN}, so the running mean of earlier gradients is lost; "
                'resume from another checkpoint, or with support="rest"'
            )
        self._selection.load_mean_tensors(load_file(folder / _MEAN))


def _refuse_packing(args: TrainingArguments, collate: Any) -> None:
    """Refuse rows that hold several samples, as far as arguments and collator tell."""
    packed = [name for name in ("packing", "padding_free") if getattr(args, name, False)]
    flattening = getattr(collate, "padding_free", False) or "Flattening" in type(collate).__name__
    if packed or flattening:
        raise UnsupportedError(
            f"{' and '.join(packed) or type(collate).__name__} puts several samples into one row, so that they cannot "
            "be selected one by one; turn packing and padding_free off"
        )


def _are_pairs(trainer: Trainer | None, collate: Any) -> bool:
    """Whether the batches hold chosen rows first and rejected rows second, as TRL's paired preference trainers do."""
    collators = (collate, getattr(trainer, "data_collator", None))
    names = [kind.__name__ for c in collators if c is not None for kind in type(c).__mro__]
    triple = next((name for name in names if "TriplePreference" in name), None)
    if triple is not None:
        raise UnsupportedError(
            f"{triple} makes three rows of one sample, which cannot be selected together; samples may be rows or pairs"
        )
    paired = ("Preference" in name or "DPO" in name for name in names if "Unpaired" not in name)
    return any(paired)
