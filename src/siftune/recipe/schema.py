"""Recipe: all options of a training run in one dataclass, with a group for the settings of every method.

The field below is the default; a YAML file overrides it, and a flag overrides both. The line under a field is its
`--help`. Nothing here imports torch, so `siftune --help` stays fast.
"""

import os
from collections.abc import Collection, Iterator
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
    Count,
    NotNegative,
    Positive,
    Seed,
    Settings,
    Share,
    Steps,
    Validated,
)
from siftune.methods import METHODS, Method, all_parts
from siftune.models.adapters.registry import ADAPTER_TYPES, Shape, filled_in

T = TypeVar("T", bound=type)

TARGET_LAST = 0.33  # ours, measured: docs/measured.md


def with_groups(kind: T) -> T:
    """Add a field for the settings of every method to a recipe, after its own fields."""
    groups = {part.settings.group: part.settings for part in all_parts()}
    defaults = {group: field(default_factory=settings) for group, settings in groups.items()}
    body = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__annotations__": groups, **defaults}
    return dataclass(config=CONFIG)(type(kind.__name__, (kind,), body))  # type: ignore[return-value]


@with_groups
@dataclass(config=CONFIG)
class Recipe(Validated):
    """Fine-tune a language model with adapters, updating only the layers that count.

    A RECIPE.yaml sets any of the options below; flags override it. Besides these fields a recipe has one for each
    method with options, such as `gast`, which holds its `Settings`; see `siftune.methods`.
    """

    model: str = "smollm2"
    """Model to tune: a folder, a hub id, smollm2 (packaged, no hub needed), or a kit of siftune emulate."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights; auto: the checkpoint's, or float32 on a processor that lacks it."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Round the frozen weights to 4 bits (NF4) or 8, by bitsandbytes: less memory."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Implementation of attention; auto: transformers' choice; where that is sdpa, short rows take faster products on
    processors."""

    train: str | tuple[str, ...] = ""
    """Training rows: a .jsonl, .json, .csv or .parquet file, or a hub id; or several, whose rows are put together."""
    train_split: str = "train"
    """Split to train on, where the data has splits."""
    limit: Count | None = None
    """Use only the first so many rows of each of these."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """Where rows cannot be used: stop and name them all, or drop them and train on the others."""
    eval: str | None = None
    """Held-out rows: a file or hub id, as for train."""
    eval_share: BelowOne = 0.0
    """Share of the training rows to hold out instead, by what they say, so that a row stays when others are added."""
    eval_split: str = "test"
    """Split to evaluate on, where the data has splits."""
    format: Literal["auto", "prompt", "messages", "alpaca"] = "auto"
    """Columns of the rows: prompt and completion; messages; or instruction, input and output."""
    template: Literal["auto", "chat", "none"] = "auto"
    """Chat template: auto uses the tokenizer's if it has one, chat demands it, none leaves text as it is."""
    max_length: AtLeastTwo = 512
    """Longest row in tokens, prompt and completion together."""
    completion_only: bool = True
    """Learn the completions alone, not the prompts."""

    method: Literal[tuple(METHODS)] = "dense"  # type: ignore[valid-type]
    """How to train; each has options of its own below, but for dense, where all layers follow all rows: no other was
    better in our measurements (docs/measured.md), so begin with it."""
    target: str | None = None
    """File or hub id of few clean rows of the task that counts: they are trained on too, and with method gast or greats
    decide which rows of the others are followed."""
    target_share: BelowOne = 0.25
    """Share of the training rows that target's rows are repeated to make up, each 30 times at the most; 0: they are not
    trained on."""
    target_last: Share | None = None
    """Share of the steps, the last ones, in which all of target's rows come; 1: they come all along. A third if not
    given, 1 with method greats."""

    drop_rows: str | None = None
    """File of training rows to leave out: places such as rows.jsonl:17, one a line, or a CSV file with a column place,
    as siftune rows --csv writes it."""

    adapter: Literal[(*ADAPTER_TYPES, "full")] = "lora"  # type: ignore[valid-type]
    """Adapter type (docs/adapters.md); full: none, the weights of the chosen layers themselves train."""
    layers: tuple[int, ...] | None = None
    """Numbers of the decoder layers that train, from 0, negative from the end; all if not given, a kit's outer layers
    for kits."""
    outside: tuple[Literal["embeddings", "head"], ...] = ()
    """With adapter full: what else trains whole, in every step (LISA's paper: both)."""
    rank: Count | None = None
    """Rank of the adapter matrices, or width of a bottleneck; if not given the kind's: 32 for lora."""
    alpha: Count | None = None
    """Scale of the adapter response; twice the rank if not given, 16 for rslora, the rank for series, four times it for
    parallel."""
    dropout: BelowOne = 0.0
    """Dropout on the adapter input."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """First values of the adapter, as PEFT has them; pissa and olora begin with a part of the base's weights."""
    from_adapter: str | None = None
    """Run, or folder of an adapter, whose adapter to go on training, with its rank, alpha and modules."""
    targets: tuple[str, ...] | None = None
    """Names of the modules that get adapters, such as q_proj v_proj; found in the model if not given. With series and
    parallel attention, mlp or both: series has both if not given, parallel mlp."""

    lr: Positive | None = None
    """Peak learning rate; the method's if not given: 2e-3 for ist and ist+gast, 1e-3 for rst and cut, else 5e-4."""
    batch_size: Count = 16
    """Rows in a forward pass."""
    group_by_length: bool = False
    """Batch rows of like length: less padding, so faster, but rows of one kind then come together."""
    accumulate: Count = 1
    """Forward passes in an optimizer step."""
    auto_batch: bool = False
    """Where memory runs out, go on from the newest checkpoint with half of batch_size and twice accumulate, as often as
    it takes: the same rows in every step. Methods that choose rows choose among fewer then."""
    epochs: Positive = 1.0
    """Passes over the training rows."""
    steps: Count | None = None
    """Optimizer steps; takes the place of epochs."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup: Steps = 0.03
    """Steps over which the learning rate rises from zero: a whole number of them, or a fraction below 1 of all."""
    weight_decay: NotNegative = 0.0
    """Decay of the adapter weights."""
    clip: NotNegative = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    dp_epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    """Differential privacy for every training row: the largest ε of the run. Smaller protects more and learns less."""
    dp_delta: Chance | None = None
    """With dp_epsilon: its δ, the chance that the promise fails; well below one over the number of rows."""
    dp_clip: Positive = 0.1
    """With dp_epsilon: largest norm of what one row adds to a step's gradient."""
    sharding: Literal["none", "fsdp"] = "none"
    """With several processes: fsdp divides the frozen weights among them and gathers a layer's as it runs, for models
    that do not fit one GPU; adapters stay whole on each. One process holds all of it either way."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Have torch.compile make attention, MLPs and norms: less memory, after some time of compiling, and losses that
    differ in the last bits."""
    seed: Seed = 0
    """Seed of every random choice."""

    out: str | None = None
    """Run folder; runs/DATE-METHOD if not given."""
    resume: bool | str = False
    """Go on from the newest checkpoint in out, from that of this run folder, by its own recipe, or from this checkpoint
    folder."""
    save_every: Count | None = None
    """Optimizer steps between two checkpoints, all of which are kept; if not given, after every tenth of the run, every
    15 minutes, at the least held-out loss and at the end, of which the last two and the best are kept."""
    eval_every: Count | None = None
    """Optimizer steps between two evaluations; after every epoch if not given."""
    patience: Count | None = None
    """Stop early: after so many evaluations in a row that found no less held-out loss. What had the least is then kept,
    also where the run came to its end."""
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
    for part, settings in zip(method_of(recipe).parts, settings_of(recipe), strict=True):
        if part.by_support:  # a method without the option support uses a target if there is one
            default = "dataset" if recipe.target else "sample"
            return bool(getattr(settings, "support", default) == "dataset")
    return False


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
    goes_on = compares(recipe) and not any(part.until_target for part in method_of(recipe).parts)
    return 1.0 if recipe.target is None or goes_on else TARGET_LAST


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
