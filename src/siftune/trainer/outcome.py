"""What a run leaves behind when training ends, however it does: what was trained, the summary, the model card."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from siftune.config import Recipe
from siftune.environment import peak_memory_mb
from siftune.offsite.kit.folder import Kit
from siftune.offsite.protocol.tune import save_return
from siftune.trainer.card import model_card
from siftune.trainer.disk import disk_faults
from siftune.trainer.run_folder import RunFolder
from siftune.trainer.trainer import LayerTrainer, SiftTrainer


@dataclass(frozen=True)
class Outcome:
    """Writes what a run leaves behind.

    Attributes:
        trainer: Its Trainer.
        folder: Its folder.
        recipe: Its settings, resolved.
        kit: The kit that is tuned; None for an ordinary model.
    """

    trainer: SiftTrainer
    folder: RunFolder
    recipe: Recipe
    kit: Kit | None

    def summary(self, seconds: float) -> dict[str, Any]:
        """Steps, losses, seconds, tokens and peak memory in MB."""
        state = self.trainer.state
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        evals = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        return {
            "steps": state.global_step,
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "eval_loss": evals[-1] if evals else None,
            "seconds": round(seconds, 2),
            "tokens": int(state.num_input_tokens_seen),
            "peak_memory_mb": round(peak_memory_mb(), 1),
        }

    def words(self) -> str:
        """Say what will be where, for a run that ends early."""
        step = self.trainer.state.global_step
        if not step:
            return "no step was finished"
        if self._has_adapter:
            return f"the adapter after step {step} is in {self.folder.adapter}"
        return f"the return after step {step} is in {self.folder.returned}"

    def leave(self, status: str, summary: dict[str, Any]) -> None:
        """Write what was trained, run.json and the model card."""
        card = model_card(self.recipe, summary, self.kit is not None)
        parts: dict[str, Callable[[Path], None]] = {}
        if self._has_adapter:
            parts[self.folder.adapter.name] = partial(self._save_adapter, card)
        if self.kit is not None:
            parts[self.folder.returned.name] = partial(save_return, model=self.trainer.model, kit=self.kit)
        with disk_faults(self.folder.path):
            self.folder.replace(parts)
            self.folder.write_run(status=status, summary=summary)
            self.folder.write("README.md", card)

    @property
    def _has_adapter(self) -> bool:
        """Whether there is something to use besides the return: of a kit's own weights, the return says it all."""
        return self.kit is None or isinstance(self.trainer.model, PeftModel)

    def _save_adapter(self, card: str, path: Path) -> None:
        if isinstance(self.trainer, LayerTrainer):
            self.trainer.save_layers(path)
        else:
            self.trainer.model.save_pretrained(path)
        self.trainer.processing_class.save_pretrained(path)
        (path / "README.md").write_text(card, encoding="utf-8")
