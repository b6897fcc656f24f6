"""Logits at label positions only, for any transformers Trainer and for custom training loops.

Loss and gradients are those of the model, up to rounding. It saves the head's time and memory at prompts and padding;
siftune's own training path does so by itself.
"""

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import UnsupportedError
from siftune.methods.host.callback import calling_trainer
from siftune.models.label_logits import LabelHead


class LabelLogits(TrainerCallback):  # type: ignore[misc]
    """Have a causal LM compute logits at label positions only in training; loss and gradients are unchanged.

    With a large vocabulary, long prompts and short answers, most of the head's work and memory goes to logits without a
    loss. It works in transformers' `Trainer`, in TRL's `SFTTrainer` and in loops in which the model computes its loss.
    Trainers that read the logits themselves (with a `compute_loss` of their own, as in preference training) are
    refused. If a model's loss is not its mean over label tokens, the first batch shows it: a warning is logged, and the
    model is left unchanged.

    Raises:
        UnsupportedError: The Trainer reads logits, uses `nn.DataParallel`, or compiles the model.
        LayerError: The model has no head of its own.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[LabelLogits()])
        >>> output = trainer.train()
        >>> with LabelLogits().attach(model):
        ...     output = model(**batch)
        >>> (batch["labels"][:, 1:] != -100).sum(), output.logits.shape  # of 24 labels, and one more
        (tensor(24), torch.Size([1, 25, 96]))
    """

    def __init__(self) -> None:
        self._head: LabelHead | None = None

    def __repr__(self) -> str:
        return "LabelLogits()"

    def attach(self, model: nn.Module) -> LabelHead:
        """Use it in a custom training loop.

        Args:
            model: A causal LM, PEFT-wrapped or not, that is called with `labels`.

        Returns:
            A context manager that restores the model at its end.
        """
        return LabelHead(model)

    def remove(self) -> None:
        """Restore the model; needed only after an exception in training."""
        if self._head is not None:
            self._head.remove()
            self._head = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the Trainer does not read logits, and begin."""
        self.remove()
        trainer = calling_trainer(self)
        _refuse_spread_or_compiled(args)
        if trainer is not None:
            _refuse_readers(trainer)
        self._head = LabelHead(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the model."""
        self.remove()


def _refuse_spread_or_compiled(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"the Trainer spreads every batch over {args.n_gpu} GPUs by nn.DataParallel, whose copies of the model "
            "share one state: start the script with torchrun for DDP, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if args.torch_compile:
        raise UnsupportedError(
            "torch_compile would recompile for every number of labels in a batch: leave it or LabelLogits out"
        )


def _refuse_readers(trainer: Trainer) -> None:
    """Refuse a Trainer whose `compute_loss` may read the model's logits."""
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    if owner is Trainer:
        return
    if owner.__module__.startswith("trl.") and owner.__name__ == "SFTTrainer":
        if not _has_fused_head():
            raise UnsupportedError("this version of TRL reads all logits for its metrics: update it to 1.16 or later")
        return
    if _hands_on(owner, trainer):
        return
    raise UnsupportedError(
        f"{owner.__name__} computes its loss from logits itself and may need all of them: LabelLogits supports "
        "transformers' Trainer, TRL's SFTTrainer, and those of axolotl and LLaMA-Factory with the model's loss; in "
        "siftune's own training path it is not needed"
    )


def _hands_on(owner: type, trainer: Trainer) -> bool:
    """Whether `compute_loss` is of a tool that leaves the loss to transformers with these arguments."""
    tool = (owner.__module__.partition(".")[0], owner.__name__)
    if tool == ("axolotl", "AxolotlTrainer"):
        return not trainer.args.orpo_alpha
    return tool == ("llamafactory", "CustomSeq2SeqTrainer") and not trainer.finetuning_args.use_asft_loss


def _has_fused_head() -> bool:
    from trl.trainer import utils

    return hasattr(utils, "add_fused_lm_head")
