"""Model cards in the hub's format: of what a run has trained, and of a model that it was merged into."""

from pathlib import Path
from typing import Any

import yaml

from siftune.base.environment import hardware, versions
from siftune.models.origin import Origin
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import Recipe, method_of, train_files

_WITH_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({adapter!r})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})
"""

_TEACH = """\
from siftune.models.adapters.own import register

register()  # PEFT has no such adapters
"""

_WITH_LAYERS = """\
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({adapter!r})
model = AutoModelForCausalLM.from_pretrained({base!r})
model.load_state_dict(load_file({adapter!r} + "/tuned_layers.safetensors"), strict=False)
"""

_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({adapter!r})
model = AutoModelForCausalLM.from_pretrained({adapter!r})
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
    """The card of what a run has trained: what was tuned, how, on what, with which result, and how to use it.

    `folder` is where what was trained is; `chat` says that rows were written by the tokenizer's chat template.
    """
    full = recipe.adapter == "full"
    first = _TEACH if recipe.adapter in ("series", "parallel", "prefix") else ""
    use = _snippet(_WITH_LAYERS if full else first + _WITH_ADAPTER, base, folder, chat)
    more = " `siftune export` makes an ordinary model of it." if full else ""
    return _card(recipe, summary, _head(recipe, base), f"{use}\n{_prompts(chat)}{_whence(base)}{more}\n")


def card_with_usage(recipe: Recipe, summary: dict[str, Any], base: Origin, usage: str) -> str:
    """The same for what is used in another way, as `usage` says."""
    return _card(recipe, summary, _head(recipe, base), usage)


def merged_card(recipe: Recipe | None, base: Origin, folder: Path, chat: bool) -> str:
    """The card of a base model with what was trained in it, in `folder`; the recipe is None where it is not known.

    `chat` says that the tokenizer has a chat template, and rows were written by it as far as is known.
    """
    tags = ["siftune"] if recipe is None else ["siftune", recipe.method, recipe.adapter]
    how = "" if recipe is None else f"\n{_how(recipe)}\n"
    settings = "" if recipe is None else f"\n## Recipe\n\n```yaml\n{recipe_to_yaml(recipe)}```\n"
    papers = "".join(f"\n- `{path.name}`" for path in base.papers)
    terms = f"The base model's terms hold for this one, too: {base.licence or 'see there'}.{papers}"
    return (
        f"{_front(base, 'transformers', tags, 'finetune')}\n# {_name(base)}, tuned with siftune, merged\n{how}\n"
        f"## Use\n\n{_snippet(_MERGED, base, folder, chat)}\n{_prompts(chat)}{_whence(base)}\n\n"
        f"## Licence\n\n{terms}\n{settings}"
    )


def _card(recipe: Recipe, summary: dict[str, Any], head: str, usage: str) -> str:
    return f"""{head}
{_how(recipe)}

| | |
|---|---|
| optimizer steps | {_steps(summary)} |
| training loss, last | {_training_loss(summary)} |
| held-out loss | {_held_out_loss(summary)} |
| time | {summary["seconds"]:.0f} s on {_machine()}{_since(summary)} |
| peak memory | {summary["peak_memory_mb"]:,.0f} MB |

{_promise(summary)}## Use

{usage}
## Recipe

```yaml
{recipe_to_yaml(recipe)}```

Versions: {", ".join(f"{name} {number}" for name, number in versions().items())}.
"""


def _head(recipe: Recipe, base: Origin) -> str:
    library = "transformers" if recipe.adapter == "full" else "peft"
    front = _front(base, library, ["siftune", recipe.method, recipe.adapter])
    return f"{front}\n# {_name(base)}, tuned with siftune\n"


def _front(base: Origin, library: str, tags: list[str], relation: str | None = None) -> str:
    """What the hub reads: nothing stands there that is not known."""
    fields = {"base_model": _name(base), "library_name": library, "tags": tags}
    known = {"base_model_relation": relation, "license": base.licence}
    fields |= {name: value for name, value in known.items() if value is not None}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _name(base: Origin) -> str:
    return base.hub_id or base.place


def _how(recipe: Recipe) -> str:
    return f"""{_what(recipe)}
Method: {recipe.method} — {method_of(recipe).line}.
{_data(recipe)}"""


def _snippet(load: str, base: Origin, folder: Path, chat: bool) -> str:
    """Code that runs as it stands on the machine where it was written."""
    loading = load.format(base=base.place, adapter=str(folder))
    return f"```python\n{loading}{_CHAT if chat else _PLAIN}{_ANSWER}```\n"


def _prompts(chat: bool) -> str:
    if chat:
        return "Prompts are written by the tokenizer's chat template, as in training."
    return "Prompts are text as it is, and the answer follows at once: no chat template, as in training."


def _whence(base: Origin) -> str:
    if base.hub_id is None or base.hub_id == base.place:
        return ""
    return f" On the hub the base model is {base.hub_id}."


def _steps(summary: dict[str, Any]) -> str:
    kept = summary.get("kept_step")
    return str(summary["steps"]) if kept is None else f"{summary['steps']}; kept is step {kept}, of least held-out loss"


def _since(summary: dict[str, Any]) -> str:
    """Say after which step the time begins, where a run went on."""
    step = summary.get("resumed_step")
    return "" if step is None else f", for the steps after {step}"


def _training_loss(summary: dict[str, Any]) -> str:
    if "privacy" in summary:
        return "not told: it has no noise"
    loss = summary["loss_last"]
    return "not logged" if loss is None else f"{loss:.4f}"


def _held_out_loss(summary: dict[str, Any]) -> str:
    loss, step = summary["eval_loss"], summary.get("eval_step")
    return "not measured" if loss is None else f"{loss:.4f}{'' if step is None else f', after step {step}'}"


def _machine() -> str:
    """The machine, in words; records keep `hardware()` as it is, by which they are compared."""
    words = hardware()
    return words.removesuffix("s") if words.endswith(" 1 threads") else words


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
    sizes = [f"{name} {getattr(recipe, name)}" for name in ("rank", "alpha") if getattr(recipe, name) is not None]
    return f"Adapter: {', '.join([recipe.adapter, *sizes])}{where}."


def _data(recipe: Recipe) -> str:
    """Say on what a run trained and measured."""
    files = [f"`{name}`" for name in train_files(recipe)]
    share = f", held out {recipe.eval_share:.3g} of it" if recipe.eval_share else ""
    return f"Data: {', '.join(files)}{f', held out `{recipe.eval}`' if recipe.eval else share}."
