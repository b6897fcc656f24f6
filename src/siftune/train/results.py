"""Results of a run, however it ends: trained weights, summary, model card."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from siftune.base.environment import peak_memory_mb
from siftune.base.files import disk_faults
from siftune.data.encoder import writes_chat
from siftune.methods.dp.accounting import statement
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.models.save import save_tokenizer
from siftune.models.source import Origin, origin_of
from siftune.recipe.schema import Recipe
from siftune.train.folder.card import card_with_usage, model_card
from siftune.train.folder.checkpoints import step_of, whole_checkpoints
from siftune.train.folder.run import RunFolder
from siftune.train.folder.weights import save_adapter
from siftune.train.guards.non_finite import SKIPPED, skipped_steps
from siftune.train.prepare import Source
from siftune.train.trainer import LayerTrainer, SiftTrainer


class Followed:
    """Counts over the batches of a run, on this rank, since it was resumed; `sources` says where each row is from."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = sources
        self._followed: dict[str, float] = {}
        self._seen: dict[str, int] = {}

    def note(self, choice: SampleChoice, rows: Sequence[int]) -> None:
        """Count the choice in a batch, whose rows have these numbers among the training rows."""
        for row in rows:
            self._seen[self._sources[row]] = self._seen.get(self._sources[row], 0) + 1
        for unit in choice.selected.tolist():
            for place in unit:
                if place < 0:  # where a layer followed fewer rows than another
                    continue
                source = self._sources[rows[place]]
                self._followed[source] = self._followed.get(source, 0.0) + 1 / len(choice.layers)

    def shares(self) -> dict[str, float]:
        """Source -> share of its rows that were followed, 0 to 1: the mean over layers; empty where nothing was chosen.

        Example:
            >>> followed, scores = Followed(["web", "books"]), torch.zeros(2, 2)
            >>> choice = SampleChoice(0, 0, ("a", "b"), (0, 1), scores, torch.tensor([[0], [1]]))
            >>> followed.note(choice, [0, 1])
            >>> followed.shares()
            {'books': 0.5, 'web': 0.5}
        """
        return {source: round(self._followed.get(source, 0.0) / self._seen[source], 4) for source in sorted(self._seen)}


@dataclass(frozen=True)
class Outcome:
    """Writes what a run leaves behind."""

    trainer: SiftTrainer
    folder: RunFolder
    recipe: Recipe  # its settings, resolved
    source: Source
    followed: Followed  # what shares of its rows were followed
    begun: int = 0  # steps that were done before: where it goes on from

    def summary(self, seconds: float) -> dict[str, Any]:
        """Steps, losses, seconds, tokens, peak memory in MB, shares of rows followed, and privacy.

        Where the weights of an earlier step than the last were kept, `kept_step` says which, and `eval_loss` is theirs;
        where the last held-out loss is of an earlier step, `eval_step` says of which. `seconds` are of this call alone:
        where a run goes on, `resumed_step` says after which step they begin.
        """
        state = self.trainer.state
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        evals = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        kept = self.trainer.kept_step
        measured = max(evals, default=state.global_step) if kept is None else state.global_step
        return {
            "steps": state.global_step,
            **({} if kept is None else {"kept_step": kept}),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "eval_loss": (evals[max(evals)] if kept is None else evals[kept]) if evals else None,
            **({} if measured == state.global_step else {"eval_step": measured}),
            "seconds": round(seconds, 2),
            **({"resumed_step": self.begun} if self.begun else {}),
            "tokens": int(state.num_input_tokens_seen),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            **({SKIPPED: skipped} if (skipped := skipped_steps(state)) else {}),
            "followed": self.followed.shares(),
            **self._privacy(),
        }

    def _privacy(self) -> dict[str, Any]:
        """What may be said of a private run's steps, those that were done; else nothing."""
        privacy = self.trainer.privacy
        steps = self.trainer.state.global_step
        return {} if privacy is None else {"privacy": statement(privacy.mechanism, steps)}

    def words(self) -> str:
        """Say what will be where, for a run that ends early."""
        step = self.trainer.state.global_step
        if not step:
            return "no step was finished"
        name = next(iter(self._parts("")))
        return f"the {name} after step {step} is in {self.folder.path / name}{self._onward(step)}"

    def _onward(self, step: int) -> str:
        """Say how a run goes on that ends early, after `step`; nothing where no checkpoint was written."""
        newest = next(whole_checkpoints(self.folder.checkpoints), None)
        if newest is None:
            return ""
        where = "there" if step_of(newest) == step else f"step {step_of(newest)}"
        return f", and `siftune train --resume {self.folder.path}` goes on from {where}"

    def leave(self, status: str, summary: dict[str, Any]) -> None:
        """Write what was trained, run.json and the model card."""
        card = self._card(summary)
        with disk_faults(self.folder.path):
            self.folder.replace(self._parts(card))
            self.folder.write_run(status=status, summary=summary)
            self.folder.write("README.md", card)

    def _card(self, summary: dict[str, Any]) -> str:
        if self.source.usage is not None:  # a kit: its files are not opened again, and say what they like
            return card_with_usage(self.recipe, summary, Origin(self.recipe.model), self.source.usage)
        base = origin_of(self.recipe.model)
        chat = writes_chat(self.recipe.template, self.trainer.processing_class)
        return model_card(self.recipe, summary, base, self.folder.adapter.absolute(), chat)

    def _parts(self, card: str) -> dict[str, Callable[[Path], None]]:
        """What is left in subfolders, and how: the adapter first, then what the source adds or has in its place."""
        leaves = self.source.leaves(self.trainer.model, self._privacy().get("privacy"))
        if leaves and not isinstance(self.trainer.model, PeftModel):
            return dict(leaves)
        return {self.folder.adapter.name: partial(self._save_adapter, card), **leaves}

    def _save_adapter(self, card: str, path: Path) -> None:
        if isinstance(self.trainer, LayerTrainer):
            self.trainer.save_layers(path)
        else:
            save_adapter(self.trainer.model, path, self.folder.checkpoints)
        save_tokenizer(self.trainer.processing_class, path)
        (path / "README.md").write_text(card, encoding="utf-8")
