"""The model card of a run."""

from typing import Any

from siftune.config import Recipe
from siftune.recipe_file import recipe_to_yaml
from siftune.train.run_folder import hardware, versions

_METHODS = {
    "dense": "every layer's adapter trains in every step",
    "rst": "random sparse tuning: layers drawn uniformly in every step",
    "ist": "importance-aware sparse tuning, arXiv 2410.11772: layers drawn by their importance in every step",
    "gast": "gradient-aligned sparse tuning, arXiv 2603.09865: every layer follows the rows that point its way",
    "ist+gast": "layers drawn by importance (arXiv 2410.11772), and in them rows by gradient alignment (2603.09865)",
}


def model_card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """A card in the hub's format: what was tuned, how, on what, with which result."""
    loss = summary["loss_last"]
    tokens = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"""---
base_model: {recipe.model}
library_name: peft
tags: [siftune, {recipe.method}, {recipe.adapter}]
---

# {recipe.model}, tuned with siftune

Adapter: {recipe.adapter}, rank {recipe.rank}, alpha {recipe.alpha}.
Method: {recipe.method} — {_METHODS[recipe.method]}.
Data: `{recipe.train}`{f", held out `{recipe.eval}`" if recipe.eval else ""}.

| | |
|---|---|
| optimizer steps | {summary["steps"]} |
| training loss, last | {"not logged" if loss is None else f"{loss:.4f}"} |
| held-out loss | {"not measured" if summary["eval_loss"] is None else f"{summary['eval_loss']:.4f}"} |
| time | {summary["seconds"]:.0f} s on {hardware()} |
| peak memory | {summary["peak_memory_mb"]:,.0f} MB |

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "RUN/adapter")
```

BASE is the model above: for `smollm2`, the folder that `siftune pull smollm2` prints.

## Recipe

```yaml
{recipe_to_yaml(recipe)}```

Versions: {tokens}.
"""
