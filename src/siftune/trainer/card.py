"""The model card of a run."""

from typing import Any

from siftune.config import Recipe, method_of
from siftune.environment import hardware, versions
from siftune.recipe_file import recipe_to_yaml

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
    loss = summary["loss_last"]
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
| optimizer steps | {summary["steps"]} |
| training loss, last | {"not logged" if loss is None else f"{loss:.4f}"} |
| held-out loss | {"not measured" if summary["eval_loss"] is None else f"{summary['eval_loss']:.4f}"} |
| time | {summary["seconds"]:.0f} s on {hardware()} |
| peak memory | {summary["peak_memory_mb"]:,.0f} MB |

## Use

{usage or (_USE_LAYERS if full else _USE_ADAPTER)}
## Recipe

```yaml
{recipe_to_yaml(recipe)}```

Versions: {tokens}.
"""


def _what(recipe: Recipe) -> str:
    """Say what trained."""
    layers = None if recipe.layers is None else ", ".join(map(str, recipe.layers))
    if recipe.adapter == "full":
        others = f", and {', '.join(recipe.outside)}" if recipe.outside else ""
        return f"Trained: all weights of {'all layers' if layers is None else f'the layers {layers}'}{others}."
    where = "" if layers is None else f", in the layers {layers}"
    return f"Adapter: {recipe.adapter}, rank {recipe.rank}, alpha {recipe.alpha}{where}."
