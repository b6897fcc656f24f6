"""Logits at label positions only, for any transformers Trainer and for plain training loops.

It chooses nothing and changes nothing that is learned: loss and gradients are those of the model, up to rounding. What
is saved is the head's share of time and memory at prompts and padding; siftune's own training path saves it by itself.
"""

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import UnsupportedError
from siftune.methods.host.callback import calling_trainer
from siftune.models.label_logits import LabelHead


class LabelLogits(TrainerCallback):  # type: ignore[misc]
    """Have a causal LM compute logits only where labels are, in training; loss and gradients stay what they are.

    A vocabulary is large: where prompts are long and answers short, most of the head's work and memory goes to logits
    that no loss looks at. Works in transformers' `Trainer`, in TRL's `SFTTrainer` and in loops in which the model
    computes its loss. Trainers that read the logits themselves (`compute_loss` of their own, as in preference training)
    are refused. A model whose loss is another than its mean over label tokens is found out at the first batch, told of,
    and left alone.

    Raises:
        UnsupportedError: The Trainer reads logits, or spreads batches by `nn.DataParallel`, or compiles the model.
        LayerError: The model has no head of its own.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[LabelLogits()])
        >>> output = trainer.train()
        >>> with LabelLogits().attach(model):
        ...     output = model(**batch)
        >>> (batch["labels"][:, 1:] != -100).sum(), output.logits.shape  # those of 24 labels, and one more
        (tensor(24), torch.Size([1, 25, 96]))
    """

    def __init__(self) -> None:
        self._head: LabelHead | None = None

    def __repr__(self) -> str:
        return "LabelLogits()"

    def attach(self, model: nn.Module) -> LabelHead:
        """Put it on a model in a plain training loop.

        Args:
            model: A causal LM, PEFT-wrapped or not, that is called with `labels`.

        Returns:
            A context manager, at whose end the model is as it was.
        """
        return LabelHead(model)

    def remove(self) -> None:
        """Take everything off the model: needed only where training ended in an exception."""
        if self._head is not None:
            self._head.remove()
            self._head = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See whether the Trainer leaves the logits alone, and begin."""
        self.remove()
        trainer = calling_trainer(self)
        _refuse_spread_or_compiled(args)
        if trainer is not None:
            _refuse_readers(trainer)
        self._head = LabelHead(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self.remove()


def _refuse_spread_or_compiled(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"the Trainer spreads every batch over {args.n_gpu} GPUs by nn.DataParallel, whose copies of the model "
            "share one state: start the script with torchrun for DDP, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if args.torch_compile:
        raise UnsupportedError(
            "torch_compile would compile anew for every number of labels in a batch: leave it or LabelLogits out"
        )


def _refuse_readers(trainer: Trainer) -> None:
    """Refuse a Trainer of whose `compute_loss` it is not known that it leaves the model's logits alone."""
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
        f"{owner.__name__} computes its loss from logits by itself, all of which it may need: LabelLogits goes with "
        "transformers' Trainer, TRL's SFTTrainer, and those of axolotl and LLaMA-Factory where the loss is the "
        "model's, and siftune's own training path does without"
    )


def _hands_on(owner: type, trainer: Trainer) -> bool:
    """Whether `compute_loss` is that of a tool which, with these arguments, leaves the loss to transformers."""
    tool = (owner.__module__.partition(".")[0], owner.__name__)
    if tool == ("axolotl", "AxolotlTrainer"):
        return not trainer.args.orpo_alpha
    return tool == ("llamafactory", "CustomSeq2SeqTrainer") and not trainer.finetuning_args.use_asft_loss


def _has_fused_head() -> bool:
    from trl.trainer import utils

    return hasattr(utils, "add_fused_lm_head")
