"""Results of a run, however it ends: trained weights, summary, model card."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from siftune.base.environment import peak_memory_mb
from siftune.base.files import disk_faults
from siftune.data.encode import writes_chat
from siftune.methods.dp.accounting import statement
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.models.save import save_tokenizer
from siftune.models.source import Origin, origin_of
from siftune.recipe.schema import Recipe
from siftune.train.folder.card import card_with_usage, model_card
from siftune.train.folder.checkpoints import step_of, whole_checkpoints
from siftune.train.folder.run_folder import RunFolder
from siftune.train.folder.weights import write_adapter
from siftune.train.guards.non_finite import SKIPPED, skipped_steps
from siftune.train.source import Source
from siftune.train.trainer import LayerTrainer, SiftTrainer


class FollowedShares:
    """Share of the rows of each source that layers follow, since the start of this process, on this rank.

    Args:
        sources: Source of each training row, by its number.

    Example:
        >>> followed, scores = FollowedShares(["web", "books"]), torch.zeros(2, 2)
        >>> followed.add(SampleChoice(0, 0, ("a", "b"), (0, 1), scores, torch.tensor([[0], [1]])), [0, 1])
        >>> followed.shares()
        {'books': 0.5, 'web': 0.5}
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = sources
        self._followed: dict[str, float] = {}
        self._seen: Counter[str] = Counter()

    def add(self, choice: SampleChoice, rows: Sequence[int]) -> None:
        """Count the choice in a batch; `rows` are the numbers of its rows among the training rows."""
        self._seen.update(self._sources[row] for row in rows)
        chosen = Counter(choice.selected.flatten().tolist())
        for place, count in chosen.items():
            source = self._sources[rows[place]]
            self._followed[source] = self._followed.get(source, 0.0) + count / len(choice.layers)

    def shares(self) -> dict[str, float]:
        """Source -> share, 0 to 1, the mean over layers; empty if no method chooses rows."""
        return {source: round(self._followed.get(source, 0.0) / self._seen[source], 4) for source in sorted(self._seen)}


@dataclass(frozen=True)
class Results:
    """Writer of a run's results."""

    trainer: SiftTrainer
    folder: RunFolder
    recipe: Recipe  # resolved
    source: Source
    followed: FollowedShares
    begun: int = 0  # steps done before a resumed run continues
    digest: str | None = None  # of the texts of the training rows; None in a private run

    def summary(self, seconds: float) -> dict[str, Any]:
        """Steps, losses, seconds, tokens, peak memory in MB, shares of followed rows, and privacy.

        `kept_step` names an earlier step whose weights are saved; `eval_loss` is then theirs. `eval_step` is there if
        the last held-out loss is of an earlier step, and `resumed_step` if `seconds` begin after a step.
        """
        state, best = self.trainer.state, self.trainer.kept_step
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        evals = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        last_eval = max(evals, default=state.global_step) if best is None else best
        return {
            "steps": state.global_step,
            **({} if best is None else {"kept_step": best}),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "eval_loss": evals[last_eval] if evals else None,
            **({"eval_step": last_eval} if best is None and last_eval != state.global_step else {}),
            "seconds": round(seconds, 2),
            **({"resumed_step": self.begun} if self.begun else {}),
            "tokens": int(state.num_input_tokens_seen),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            **({SKIPPED: skipped} if (skipped := skipped_steps(state)) else {}),
            "followed": self.followed.shares(),
            **self._privacy(),
        }

    def text(self) -> str:
        """Say where the weights of an unfinished run are, and how to resume it."""
        step = self.trainer.state.global_step
        if not step:
            return "no step was finished"
        name = next(iter(self._parts("", self.returned())))
        saved = f"the {name} after step {step} is in {self.folder.path / name}"
        newest = next(whole_checkpoints(self.folder.checkpoints), None)
        if newest is None:
            return saved
        where = "there" if step_of(newest) == step else f"step {step_of(newest)}"
        return f"{saved}, and `siftune train --resume {self.folder.path}` continues from {where}"

    def returned(self) -> Mapping[str, Callable[[Path], None]]:
        """Further results of the source, before the weights of tuned layers are rounded to the model's dtype."""
        return self.source.returned(self.trainer.model, self._privacy().get("privacy"))

    def write(self, status: str, summary: dict[str, Any], returned: Mapping[str, Callable[[Path], None]]) -> None:
        """Write trained weights, `returned`, run.json and the model card."""
        if self.source.usage is not None:  # a kit: its files are untrusted, and are not opened again
            card = card_with_usage(self.recipe, summary, Origin(self.recipe.model), self.source.usage)
        else:
            chat = writes_chat(self.recipe.template, self.trainer.processing_class)
            base = origin_of(self.recipe.model)
            card = model_card(self.recipe, summary, base, self.folder.adapter.absolute(), chat)
        with disk_faults(self.folder.path):
            self.folder.replace(self._parts(card, returned))
            about = {"source": dict(self.source.identity), "weights": self.folder.weights(), "rows": self.digest}
            self.folder.write_run(status=status, summary=summary, **about)
            self.folder.write("README.md", card)

    def _privacy(self) -> dict[str, Any]:
        """The guarantee of a private run for the steps that are done."""
        privacy = self.trainer.privacy
        return {} if privacy is None else {"privacy": statement(privacy.mechanism, self.trainer.state.global_step)}

    def _parts(self, card: str, returned: Mapping[str, Callable[[Path], None]]) -> Mapping[str, Callable[[Path], None]]:
        """Subfolders and their writers: the adapter first, then what the source adds or has in its place."""
        if returned and not isinstance(self.trainer.model, PeftModel):
            return returned
        return {self.folder.adapter.name: partial(self._save_weights, card), **returned}

    def _save_weights(self, card: str, path: Path) -> None:
        if isinstance(self.trainer, LayerTrainer):
            self.trainer.save_layers(path)
        else:
            write_adapter(self.trainer.model, path)
        save_tokenizer(self.trainer.processing_class, path)
        (path / "README.md").write_text(card, encoding="utf-8")
