"""Model cards in the hub's format, for the result of a run and for a merged model.

A card is for publication: it has the names of files and folders without their paths, which name the user.
"""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from siftune.base.environment import ABOUT, hardware, versions
from siftune.models.source import Origin
from siftune.recipe.read import recipe_to_yaml, without_folders
from siftune.recipe.schema import Recipe, method_of, train_files

# sections are Jinja templates: their values are inserted as text, never rendered again
_RUN = """\
---
{{ card_data }}
---

# {{ name }}, tuned with siftune

{{ description }}

| | |
|---|---|
| optimizer steps | {{ steps }} |
| training loss, last | {{ training_loss }} |
| held-out loss | {{ heldout_loss }} |
| time | {{ time }} |
| peak memory | {{ memory }} |

{% if privacy %}## Privacy

These weights are differentially private in the training rows ({{ privacy.unit }}): \
ε = {{ "%.4g" % privacy.epsilon }}, δ = {{ "%g" % privacy.delta }}, counted by
{{ privacy.accountant }} {{ privacy.accountant_version }}. Each of the {{ privacy.steps }} steps drew every row with \
probability {{ "%.4g" % privacy.sampling_rate }}, clipped
each row's gradient to norm {{ "%g" % privacy.clip }} over all layers, and added Gaussian noise of \
{{ "%.4g" % privacy.noise_multiplier }} times that.

Losses, counts and times in the run folder, held-out rows, and settings chosen by other runs on these rows are not
covered.

{% endif %}## Use

{{ usage }}

## Recipe

```yaml
{{ recipe }}
```

Versions: {{ versions }}.

{{ about }}"""

_MERGED = """\
---
{{ card_data }}
---

# {{ name }}, tuned with siftune, merged
{% if description %}
{{ description }}
{% endif %}
## Use

{{ usage }}

## Licence

The base model's terms apply to this model too: {{ licence }}.{% for paper in papers %}
- `{{ paper }}`{% endfor %}
{% if recipe %}
## Recipe

```yaml
{{ recipe }}
```
{% endif %}
{{ about }}"""

_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder!r})
"""

_REGISTER = """\
from siftune.models.adapters.bottleneck import register

register()  # PEFT does not have these adapters
"""

_LAYERS = """\
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({base!r})
model.load_state_dict(load_file({folder!r} + "/tuned_layers.safetensors"), strict=False)
"""

_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r})
"""

_CHAT = """
messages = [{"role": "user", "content": "What can you do?"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
"""

_PLAIN = """
inputs = tokenizer("What can you do?", return_tensors="pt")
"""

_ANSWER = """\
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def model_card(recipe: Recipe, summary: dict[str, Any], base: Origin, folder: Path, chat: bool) -> str:
    """Model card of a run.

    Args:
        recipe: Resolved settings.
        summary: The run's summary, as in run.json.
        base: Origin of the base model.
        folder: Folder of the trained weights.
        chat: Whether prompts are formatted with the tokenizer's chat template.
    """
    full = recipe.adapter == "full"
    load = _LAYERS if full else f"{_REGISTER if recipe.adapter in ('series', 'parallel') else ''}{_ADAPTER}"
    more = " `siftune export` makes an ordinary model of it." if full else ""
    return card_with_usage(recipe, summary, base, f"{_usage(load, base, folder, chat)}{more}")


def card_with_usage(recipe: Recipe, summary: dict[str, Any], base: Origin, usage: str) -> str:
    """Model card of a run whose result is used as `usage` says; other arguments as for `model_card`."""
    recipe = without_folders(recipe)
    loss, heldout, best = summary["loss_last"], summary["eval_loss"], summary.get("kept_step")
    if "privacy" in summary:
        training_loss = "not reported: it has no noise"
    else:
        training_loss = "not logged" if loss is None else f"{loss:.4f}"
    measured = f", after step {summary['eval_step']}" if "eval_step" in summary else ""
    resumed = f", for the steps after {summary['resumed_step']}" if "resumed_step" in summary else ""
    machine = hardware()
    machine = machine.removesuffix("s") if machine.endswith(" 1 threads") else machine
    library = "transformers" if recipe.adapter == "full" else "peft"
    return _rendered(
        _RUN,
        _data(base, library, ["siftune", recipe.method, recipe.adapter]),
        name=_name(base),
        description=_description(recipe),
        steps=summary["steps"] if best is None else f"{summary['steps']}; weights of step {best}, the best on held-out",
        training_loss=training_loss,
        heldout_loss="not measured" if heldout is None else f"{heldout:.4f}{measured}",
        time=f"{summary['seconds']:.0f} s on {machine}{resumed}",
        memory=f"{summary['peak_memory_mb']:,.0f} MB",
        privacy=summary.get("privacy"),
        usage=usage,
        recipe=recipe_to_yaml(recipe).rstrip("\n"),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
    )


def merged_card(recipe: Recipe | None, base: Origin, folder: Path, chat: bool) -> str:
    """Model card of a base model with trained weights merged into it.

    Args:
        recipe: The run's recipe; None if unknown.
        base: Origin of the base model.
        folder: Folder of the merged model.
        chat: Whether prompts are formatted with the tokenizer's chat template.
    """
    recipe = None if recipe is None else without_folders(recipe)
    tags = ["siftune"] if recipe is None else ["siftune", recipe.method, recipe.adapter]
    return _rendered(
        _MERGED,
        _data(base, "transformers", tags, "finetune"),
        name=_name(base),
        description=None if recipe is None else _description(recipe),
        usage=_usage(_MODEL, base, folder, chat),
        licence=base.licence or "see there",
        papers=[path.name for path in base.papers],
        recipe=None if recipe is None else recipe_to_yaml(recipe).rstrip("\n"),
    )


def _rendered(template: str, data: ModelCardData, **values: Any) -> str:
    return f"{ModelCard.from_template(data, template_str=template, about=ABOUT, **values)}\n"


def _data(base: Origin, library: str, tags: list[str], relation: str | None = None) -> ModelCardData:
    name = _name(base)
    more: dict[str, Any] = {"base_model_relation": relation} if relation else {}
    return ModelCardData(base_model=name, library_name=library, tags=tags, license=base.licence, **more)


def _name(base: Origin) -> str:
    """Hub id of the base model, or the name of its folder."""
    return base.hub_id or Path(base.place).name


def _usage(load: str, base: Origin, folder: Path, chat: bool) -> str:
    """A command and code to run beside the folder, and the prompt format; base models from the hub have their ids."""
    code = load.format(base=_name(base), folder=folder.name) + (_CHAT if chat else _PLAIN) + _ANSWER
    if chat:
        prompts = "Prompts are formatted with the tokenizer's chat template, as in training."
    else:
        prompts = "Prompts are plain text, directly followed by the answer: no chat template, as in training."
    local = ""
    if "{base!r}" in load and not base.hub_id:
        local = f" The base model `{_name(base)}` is a folder: give its path, to the command with `--base`."
    command = ["siftune", "ask", folder.name, "What can you do?", *([] if chat else ["--template", "none"])]
    return f"```sh\n{shlex.join(command)}\n```\nor\n```python\n{code}```\n{prompts}{local}"


def _description(recipe: Recipe) -> str:
    """Trained weights, method and data."""
    layers = None if recipe.layers is None else ", ".join(map(str, recipe.layers))
    if recipe.adapter == "full":
        trained = f"Trained: all weights of {'all layers' if layers is None else f'the layers {layers}'}."
    else:
        sizes = [f"{name} {getattr(recipe, name)}" for name in ("rank", "alpha") if getattr(recipe, name) is not None]
        where = "" if layers is None else f", in the layers {layers}"
        trained = f"Adapter: {', '.join([recipe.adapter, *sizes])}{where}."
    files = ", ".join(f"`{name}`" for name in train_files(recipe))
    share = f", {recipe.eval_share:.3g} of it held out" if recipe.eval_share else ""
    heldout = f", held out `{recipe.eval}`" if recipe.eval else share
    return f"{trained}\nMethod: {recipe.method} — {method_of(recipe).line}.\nData: {files}{heldout}."
