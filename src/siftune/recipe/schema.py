"""Recipe: all options of a training run in one dataclass, with a group for the settings of every method.

The field below is the default; a YAML file overrides it, and a flag overrides both. The line under a field is its
`--help`. Nothing here imports torch, so `siftune --help` stays fast.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import field, fields, replace
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from siftune.base.settings import (
    CONFIG,
    AtLeastTwo,
    BelowOne,
    Chance,
    Columns,
    Count,
    NotNegative,
    Positive,
    Seed,
    Settings,
    Share,
    Steps,
    Template,
    Validated,
    help_of,
    types_of,
)
from siftune.methods import METHODS, Method, all_parts
from siftune.methods.options import KEEP_WEIGHT
from siftune.models.adapters.registry import ADAPTER_TYPES, Shape, filled_in

T = TypeVar("T", bound=type)

TARGET_LAST = 0.33  # ours, measured: docs/measured.md
# settings of the trainings by which siftune.sifting scores a pool: those of the training that follows
SCORING = (
    *("model", "dtype", "quantize", "attention", "columns", "template", "max_length", "completion_only"),
    *("bad_rows", "rank", "alpha", "targets", "layers", "lr", "batch_size", "accumulate", "checkpointing", "seed"),
    "deterministic",
)


def with_groups(kind: T) -> T:
    """Add a field for the settings of every method to a recipe, after its own fields."""
    groups = {part.settings.group: part.settings for part in all_parts()}
    return _extended(kind, groups, {group: field(default_factory=settings) for group, settings in groups.items()})


def with_settings(*names: str) -> Callable[[T], T]:
    """Add settings of a recipe to a command's options, after their own fields: type, range, default and help.

    The decorator leaves out names that the options declare themselves.
    """

    def add(kind: T) -> T:
        types, lines = types_of(Recipe), help_of(Recipe)
        added = {name: Annotated[types[name], Field(description=lines[name])] for name in names}
        for name in types_of(kind):
            added.pop(name, None)
        return _extended(kind, added, {name: getattr(Recipe, name) for name in added})

    return add


def _extended(kind: T, types: Mapping[str, Any], defaults: Mapping[str, Any]) -> T:
    """A dataclass with further fields."""
    body = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__annotations__": types, **defaults}
    return dataclass(config=CONFIG)(type(kind.__name__, (kind,), body))  # type: ignore[return-value]


@with_groups
@dataclass(config=CONFIG)
class Recipe(Validated):
    """Fine-tune a language model with adapters.

    A RECIPE.yaml sets any of the options below; flags override it. Besides these fields a recipe has one for each
    method with options, such as `gast`, which holds its `Settings`; see `siftune.methods`.
    """

    model: str = "smollm2"
    """Model to fine-tune: a folder, a hub id, smollm2 (packaged, no hub needed), or a kit of siftune emulate."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the frozen weights; auto: the checkpoint's, or float32 on a processor that lacks it."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Quantize the frozen weights to 4 bits (NF4) or 8 bits with bitsandbytes, for less memory."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention implementation; auto: the choice of transformers, with faster products for short rows on processors."""

    train: str | tuple[str, ...] = ""
    """Training rows: a .jsonl, .json, .csv or .parquet file, a .txt file with a row per line, or a hub id, also with a
    split, as in google/boolq@train; or several, which are concatenated."""
    limit: Count | None = None
    """Use at most N rows of each file."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """Unusable rows: stop and list them, or drop them and train on the others."""
    eval: str | None = None
    """Held-out rows: a file or hub id, as for train; its split is test if none is named."""
    eval_share: BelowOne = 0.0
    """Share of the training rows to hold out instead of eval. The choice depends on the content of a row only."""
    columns: Columns = ()
    """Other names of columns, such as prompt=question completion=answer. Default: prompt and completion; messages, or
    conversations (ShareGPT); instruction, input and output; or text."""
    template: Template = "auto"
    """Chat template: auto uses the tokenizer's if it has one, chat requires it, none leaves the text as is. A path: a
    file with another template."""
    max_length: AtLeastTwo = 512
    """Maximum length of a row in tokens, prompt and completion together."""
    completion_only: bool = True
    """Compute the loss on the completions only, not on the prompts."""

    method: Literal[tuple(METHODS)] = "dense"  # type: ignore[valid-type]
    """Training method. Start with dense, which trains all layers on all rows: no other was better if nothing is known
    about the rows (docs/measured.md)."""
    target: str | None = None
    """File or hub id of a few clean rows of the target task. They are added to the training rows; gast also compares
    the other rows with them."""
    target_share: BelowOne = 0.25
    """Share of the training rows that the target's rows make up, each at most 7 times; 0: compare only."""
    target_last: Share | None = None
    """Share of the steps, at the end, that holds all of the target's rows; 1: all steps. Default: a third."""

    keep: str | None = None
    """Texts on which a penalty keeps the base's predictions, against forgetting: own, written by the base itself, or a
    file or hub id (docs/forgetting.md)."""
    keep_weight: Positive = KEEP_WEIGHT
    """With keep: factor of the KL divergence from the base; a larger one keeps more and learns less."""

    drop_rows: str | None = None
    """File with training rows to leave out: one place such as rows.jsonl:17 per line, or a CSV file of siftune rows,
    siftune sift or a report page, whose column selected says no for them (docs/rows.md)."""

    adapter: Literal[(*ADAPTER_TYPES, "full")] = "lora"  # type: ignore[valid-type]
    """Adapter type (docs/adapters.md); full: no adapter, train the weights of the chosen layers."""
    layers: tuple[int, ...] | None = None
    """Indices of the decoder layers to train, from 0, negative from the end. Default: all, or the outer layers of a
    kit."""
    rank: Count | None = None
    """Rank of the adapter matrices, or width of a bottleneck. Default: 32 for lora."""
    alpha: Count | None = None
    """Scale of the adapter. Default: twice the rank, 16 for rslora, the rank for series, four times the rank for
    parallel."""
    dropout: BelowOne = 0.0
    """Dropout on the input of the adapter."""
    from_adapter: str | None = None
    """Run, or folder of an adapter, to continue training from, with its rank, alpha, dropout and modules."""
    targets: tuple[str, ...] | None = None
    """Names of the modules to adapt, such as q_proj v_proj; with series and parallel attention, mlp or both. Default:
    found in the model; both for series, mlp for parallel."""

    lr: Positive | None = None
    """Peak learning rate; the method's if not given: 1e-3 for rst, ist and ist+gast, else 5e-4."""
    batch_size: Count = 16
    """Rows per forward pass."""
    group_by_length: bool = False
    """Batch rows of similar length: less padding and faster, but similar rows come together."""
    accumulate: Count = 1
    """Forward passes per optimizer step."""
    epochs: Positive = 1.0
    """Passes over the training rows."""
    steps: Count | None = None
    """Optimizer steps; replaces epochs."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate schedule after the warm-up."""
    warmup: Steps = 0.03
    """Warm-up of the learning rate: a number of steps, or a fraction of all steps."""
    optim: str = "adamw_torch_fused"
    """Optimizer by its name in transformers, such as adafactor or paged_adamw_8bit."""
    weight_decay: NotNegative = 0.0
    """Weight decay of the trained weights."""
    clip: NotNegative = 1.0
    """Maximum gradient norm; 0 disables clipping."""
    dp_epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    """Differential privacy for every training row: the maximum ε of the run. A smaller value protects more and learns
    less."""
    dp_delta: Chance | None = None
    """With dp_epsilon: δ, the probability that the guarantee fails; far below one over the number of rows."""
    dp_clip: Positive = 0.1
    """With dp_epsilon: maximum norm of one row's contribution to a step's gradient."""
    sharding: Literal["none", "fsdp"] = "none"
    """With several processes: fsdp shards the frozen weights, for models that do not fit one GPU. Adapters are not
    sharded."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile attention, MLPs and norms with torch.compile: less memory, a delay at the start, and losses that differ
    in the last bits."""
    seed: Seed = 0
    """Random seed."""
    deterministic: bool = False
    """The Trainer's `full_determinism`: runs repeat bit for bit on the same machine, but take longer."""

    out: str | None = None
    """Run folder. Default: runs/DATE-METHOD."""
    resume: bool | str = False
    """Resume from the newest checkpoint in out, from a run folder with its own recipe, or from a checkpoint folder."""
    save_every: Count | None = None
    """Optimizer steps between two checkpoints, which are all kept. Default: at every tenth of the run, every 15
    minutes, at the lowest held-out loss and at the end; the last two and the best are kept."""
    eval_every: Count | None = None
    """Optimizer steps between two evaluations. Default: after every epoch."""
    patience: Count | None = None
    """Early stopping: evaluations without a lower held-out loss before training stops. The best weights are kept."""
    log_every: Count = 10
    """Optimizer steps between two log lines."""
    report_to: tuple[str, ...] = ("none",)
    """Experiment trackers by their transformers names, such as tensorboard or wandb."""


R = TypeVar("R", bound=Recipe)


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe names."""
    return METHODS[recipe.method]


def rate_of(recipe: Recipe) -> float:
    """Peak learning rate of a recipe: its own, or that of its method."""
    return method_of(recipe).lr if recipe.lr is None else recipe.lr


def settings_of(recipe: Recipe) -> list[Settings]:
    """The settings of the parts of a recipe's method, in their order."""
    return [getattr(recipe, part.settings.group) for part in method_of(recipe).parts]


def differences(before: Recipe, after: Recipe, free: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """Settings in which two recipes differ, those of their method if it is one, but for some: name and both values."""
    for name in (each.name for each in fields(Recipe) if each.name not in free):
        was, now = getattr(before, name), getattr(after, name)
        if was != now and not isinstance(now, Settings):
            yield name, was, now
    if before.method == after.method:
        for one, other in zip(settings_of(before), settings_of(after), strict=True):
            pairs = zip(one.to_dict().items(), other.to_dict().values(), strict=True)
            yield from ((f"{one.group}.{name}", was, now) for (name, was), now in pairs if was != now)


def compares(recipe: Recipe) -> bool:
    """Whether a recipe's method compares rows with a target."""
    pairs = zip(method_of(recipe).parts, settings_of(recipe), strict=True)
    return any(part.rows and getattr(settings, "support", None) == "dataset" for part, settings in pairs)


def train_files(recipe: Recipe) -> tuple[str, ...]:
    """The files or hub ids of a recipe's training rows."""
    return (recipe.train,) if isinstance(recipe.train, str) else recipe.train


def holds_out(recipe: Recipe) -> bool:
    """Whether a recipe has held-out rows."""
    return bool(recipe.eval or recipe.eval_share)


def compared_with(recipe: Recipe) -> str | None:
    """The file or hub id of the rows that the method compares others with; None if it compares with none."""
    return recipe.target if compares(recipe) else None


def target_comes_last(recipe: Recipe) -> float:
    """Share of the steps, the last ones, in which a target's rows come."""
    if not recipe.target_share:
        return 1.0  # they do not come at all
    if recipe.target_last is not None:
        return recipe.target_last
    return 1.0 if recipe.target is None else TARGET_LAST


def new_folder(kind: str, now: datetime | None = None) -> str:
    """Where a run goes that names no folder: runs/DATE-KIND."""
    return f"runs/{now or datetime.now():%Y%m%d-%H%M%S}-{kind}"


def resolve_recipe(recipe: R, now: datetime | None = None) -> R:
    """Fill in what depends on other fields: `lr`, `rank` and `alpha`, and `out` from the time."""
    shape = shape_of(recipe)
    return replace(
        recipe,
        lr=rate_of(recipe),
        rank=shape.rank,
        alpha=shape.alpha,
        target_last=target_comes_last(recipe) if recipe.target else recipe.target_last,
        out=os.path.expanduser(recipe.out or new_folder(recipe.method, now)),
    )


def select_until(recipe: Recipe) -> float:
    """Share of the steps, the first ones, in which methods select rows: until a target's rows begin."""
    last = target_comes_last(recipe)
    # the target's rows begin earlier if they need more of the steps
    return 1.0 if last == 1 else round(1 - max(last, recipe.target_share), 4)


def shape_of(recipe: Recipe) -> Shape:
    """The adapter that a recipe asks for, with the kind's own rank and alpha where it names none."""
    shape = Shape(**{each.name: getattr(recipe, each.name) for each in fields(Shape) if hasattr(recipe, each.name)})
    return shape if recipe.adapter == "full" else filled_in(recipe.adapter, shape)
