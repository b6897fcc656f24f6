"""AdaLoRA's allocator of ranks, PEFT's, in any Trainer; see `models.carriers.adalora`.

While it trains, every module holds all of its ranks, those that were taken away as zeros. A checkpoint holds all, where
PEFT would leave out what is zero now and may come back, and beside them what the allocator has seen.
"""

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import RecipeError
from siftune.methods.host.callback import resumed_from

FILE = "adalora_allocator.safetensors"
_SEEN = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator: a tensor for each parameter
_LEFT = "left"


class Allocator(TrainerCallback):  # type: ignore[misc]
    """Has PEFT take ranks away, in any Trainer on a model with AdaLoRA; runs go on from checkpoints bit for bit."""

    def __init__(self) -> None:
        self._pattern: dict[str, list[bool]] | None = None  # the ranks that are left, by matrix; None before any goes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the schedule, now that the Trainer knows its steps; go on with what a checkpoint holds.

        Raises:
            RecipeError: The Trainer resumes from a checkpoint that holds nothing of the allocator.
        """
        config, steps = _config(kwargs["model"]), state.max_steps
        config.total_step, config.tinit, config.tfinal, config.deltaT = steps, steps // 10, steps // 5, -(-steps // 100)
        if state.global_step:
            self._pattern = _read(kwargs["model"], resumed_from(self))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients of the step, which are still there."""
        config = _config(kwargs["model"])
        config.rank_pattern = self._pattern
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)
        self._pattern, config.rank_pattern = config.rank_pattern, None  # by which PEFT would shorten checkpoints

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the allocator's averages into the checkpoint, and the ranks that are left."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            allocator = kwargs["model"].base_model.rankallocator
            tensors = {f"{part}/{name}": value for part in _SEEN for name, value in getattr(allocator, part).items()}
            left = {f"{_LEFT}/{name}": torch.tensor(ranks) for name, ranks in (self._pattern or {}).items()}
            save_file(tensors | left, folder / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let what is saved from now on be as short as the ranks that are not zero."""
        values = {n: p for n, p in kwargs["model"].base_model.model.named_parameters() if ".lora_E." in n}
        _config(kwargs["model"]).rank_pattern = {name: (p != 0).view(-1).tolist() for name, p in values.items()}


def _config(model: Any) -> AdaLoraConfig:
    [config] = model.peft_config.values()
    return config


def _read(model: Any, checkpoint: Path | None) -> dict[str, list[bool]] | None:
    """Give PEFT's allocator what a checkpoint holds, and return the ranks that were left."""
    if checkpoint is None or not (checkpoint / FILE).is_file():
        raise RecipeError(
            f"{checkpoint} has no {FILE}, which holds what AdaLoRA's allocator saw: resume from another "
            "checkpoint, or train from the start"
        )
    held = load_file(checkpoint / FILE)
    left = {name.partition("/")[2]: ranks.tolist() for name, ranks in held.items() if name.startswith(_LEFT)}
    for name, value in held.items():
        part, _, parameter = name.partition("/")
        if part in _SEEN:
            getattr(model.base_model.rankallocator, part)[parameter] = value.to(model.device)
    return left or None
