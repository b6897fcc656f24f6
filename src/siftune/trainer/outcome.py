"""What a run leaves behind when training ends, however it does: what was trained, the summary, the model card."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from siftune.config import Recipe, method_of
from siftune.environment import hardware, peak_memory_mb, versions
from siftune.files import disk_faults
from siftune.models.portable import save_tokenizer
from siftune.recipe_file import recipe_to_yaml
from siftune.trainer.followed import Followed
from siftune.trainer.run_folder import RunFolder
from siftune.trainer.source import Source
from siftune.trainer.trainer import LayerTrainer, SiftTrainer


@dataclass(frozen=True)
class Outcome:
    """Writes what a run leaves behind.

    Attributes:
        trainer: Its Trainer.
        folder: Its folder.
        recipe: Its settings, resolved.
        source: What is tuned.
        followed: What shares of its rows were followed.
    """

    trainer: SiftTrainer
    folder: RunFolder
    recipe: Recipe
    source: Source
    followed: Followed

    def summary(self, seconds: float) -> dict[str, Any]:
        """Steps, losses, seconds, tokens, peak memory in MB, shares of rows followed, and privacy.

        Where the weights of an earlier step than the last were kept, `kept_step` says which, and `eval_loss` is theirs.
        """
        state = self.trainer.state
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        evals = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        kept = self.trainer.kept_step
        return {
            "steps": state.global_step,
            **({} if kept is None else {"kept_step": kept}),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "eval_loss": (evals[max(evals)] if kept is None else evals[kept]) if evals else None,
            "seconds": round(seconds, 2),
            "tokens": int(state.num_input_tokens_seen),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "followed": self.followed.shares(),
            **self._privacy(),
        }

    def _privacy(self) -> dict[str, Any]:
        """What may be said of a private run's steps, those that were done; else nothing."""
        privacy = self.trainer.privacy
        return {} if privacy is None else {"privacy": privacy.statement(self.trainer.state.global_step)}

    def words(self) -> str:
        """Say what will be where, for a run that ends early."""
        step = self.trainer.state.global_step
        if not step:
            return "no step was finished"
        name = next(iter(self._parts("")))
        return f"the {name} after step {step} is in {self.folder.path / name}"

    def leave(self, status: str, summary: dict[str, Any]) -> None:
        """Write what was trained, run.json and the model card."""
        card = model_card(self.recipe, summary, self.source.usage)
        with disk_faults(self.folder.path):
            self.folder.replace(self._parts(card))
            self.folder.write_run(status=status, summary=summary)
            self.folder.write("README.md", card)

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
            # embeddings are the base's: PEFT need not read the base's config again, or ask a hub, to find that out
            self.trainer.model.save_pretrained(path, save_embedding_layers=False)
        save_tokenizer(self.trainer.processing_class, path)
        (path / "README.md").write_text(card, encoding="utf-8")


_USE_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "RUN/adapter")
```

BASE is the model above: for `smollm2`, the folder that `siftune pull smollm2` prints.
"""

_USE_LAYERS = """```python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("BASE")
model.load_state_dict(load_file("RUN/adapter/tuned_layers.safetensors"), strict=False)
```

BASE is the model above: for `smollm2`, the folder that `siftune pull smollm2` prints. `siftune export RUN` saves the
tuned model as an ordinary one.
"""


def model_card(recipe: Recipe, summary: dict[str, Any], usage: str | None = None) -> str:
    """A card in the hub's format: what was tuned, how, on what, with which result.

    Args:
        recipe: Resolved settings.
        summary: The run's summary.
        usage: What to say on the use of the result; None for what holds for adapters and for tuned layers.
    """
    tokens = ", ".join(f"{name} {number}" for name, number in versions().items())
    full = recipe.adapter == "full"
    return f"""---
base_model: {recipe.model}
library_name: {"transformers" if full else "peft"}
tags: [siftune, {recipe.method}, {recipe.adapter}]
---

# {recipe.model}, tuned with siftune

{_what(recipe)}
Method: {recipe.method} — {method_of(recipe).line}.
Data: `{recipe.train}`{f", held out `{recipe.eval}`" if recipe.eval else ""}.

| | |
|---|---|
| optimizer steps | {_steps(summary)} |
| training loss, last | {_training_loss(summary)} |
| held-out loss | {"not measured" if summary["eval_loss"] is None else f"{summary['eval_loss']:.4f}"} |
| time | {summary["seconds"]:.0f} s on {hardware()} |
| peak memory | {summary["peak_memory_mb"]:,.0f} MB |

{_promise(summary)}## Use

{usage or (_USE_LAYERS if full else _USE_ADAPTER)}
## Recipe

```yaml
{recipe_to_yaml(recipe)}```

Versions: {tokens}.
"""


def _steps(summary: dict[str, Any]) -> str:
    kept = summary.get("kept_step")
    return str(summary["steps"]) if kept is None else f"{summary['steps']}; kept is step {kept}, of least held-out loss"


def _training_loss(summary: dict[str, Any]) -> str:
    if "privacy" in summary:
        return "not told: it has no noise"
    loss = summary["loss_last"]
    return "not logged" if loss is None else f"{loss:.4f}"


_PROMISE = """## Privacy

These weights are differentially private in the training rows ({unit}): ε = {epsilon:.4g}, δ = {delta:g}, counted by
{accountant} {accountant_version}. Each of the {steps} steps drew every row with chance {sampling_rate:.4g}, clipped
what a row adds to norm {clip:g} (clipping: {clipping}) and added Gaussian noise of {noise_multiplier:.4g} times that.

Not covered are losses, counts and times in the run's folder, held-out rows, and settings that were chosen by looking at
other runs on these rows.

"""


def _promise(summary: dict[str, Any]) -> str:
    """Say what a private run promises, and of what."""
    return _PROMISE.format(**summary["privacy"]) if "privacy" in summary else ""


def _what(recipe: Recipe) -> str:
    """Say what trained."""
    layers = None if recipe.layers is None else ", ".join(map(str, recipe.layers))
    if recipe.adapter == "full":
        others = f", and {', '.join(recipe.outside)}" if recipe.outside else ""
        return f"Trained: all weights of {'all layers' if layers is None else f'the layers {layers}'}{others}."
    where = "" if layers is None else f", in the layers {layers}"
    return f"Adapter: {recipe.adapter}, rank {recipe.rank}, alpha {recipe.alpha}{where}."
