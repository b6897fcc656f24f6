"""Recipes: what a training run does, as one flat dataclass.

The field below is the default, a YAML file overrides it, a command-line flag overrides both. The line under
each field is its `--help`. Nothing here imports torch, so `siftune --help` stays quick.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, TypeVar

from siftune.errors import RecipeError


@dataclass
class Recipe:
    """Fine-tune a language model with adapters, updating only the layers that count.

    A RECIPE.yaml sets any of the options below; flags override it.
    """

    model: str = "smollm2"
    """Model to tune: a folder, a hub id, smollm2 (packaged, no hub needed), or a kit of siftune emulate."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights; auto: the checkpoint's, or float32 on a processor that lacks it."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Implementation of attention; auto: transformers' choice. On processors eager is faster for short rows."""

    train: str = ""
    """Training rows: a .jsonl, .json, .csv or .parquet file, or a hub id."""
    train_split: str = "train"
    """Split to train on, where the data has splits."""
    limit: int | None = None
    """Use only the first so many training rows."""
    eval: str | None = None
    """Held-out rows: a file or hub id, as for train."""
    eval_split: str = "test"
    """Split to evaluate on, where the data has splits."""
    eval_limit: int | None = None
    """Use only the first so many held-out rows."""
    format: Literal["auto", "prompt", "messages", "alpaca"] = "auto"
    """Columns of the rows: prompt and completion; messages; or instruction, input and output."""
    template: Literal["auto", "chat", "none"] = "auto"
    """Chat template: auto uses the tokenizer's if it has one, chat demands it, none leaves text as it is."""
    max_length: int = 512
    """Longest row in tokens, prompt and completion together."""
    completion_only: bool = True
    """Learn the completions alone, not the prompts."""

    method: Literal["dense", "rst", "ist", "gast", "ist+gast"] = "ist"
    """dense: all layers and rows; rst, ist: layers drawn at random, by importance; gast: rows drawn for every layer."""
    active: float = 0.25
    """rst, ist, ist+gast: fraction of the layers that train in a step."""
    interval: int = 10
    """ist: optimizer steps between two updates of the importance."""
    score_batch_size: int = 16
    """ist: rows on which an importance update measures the loss."""
    candidates: int = 3
    """ist: sets of layers tried in an importance update."""
    suppressed: float = 0.5
    """ist: fraction of the layers in each of these sets."""
    factor: float = 0.25
    """ist: what the adapter response of a tried layer is multiplied by."""
    score_lr: float = 10.0
    """ist: learning rate of the importance."""
    select: int | float = 0.75
    """gast: rows of a batch that a layer follows: a whole number of rows, or a share such as 0.75."""
    support: Literal["sample", "rest", "momentum", "dataset"] = "sample"
    """gast: what rows are compared with: drawn training rows, the batch's others, earlier gradients, support_rows."""
    support_size: int = 4
    """gast: rows that are compared with in a step, for support sample and dataset."""
    support_rows: str | None = None
    """gast: file or hub id of rows to compare with, for support dataset: few, clean, like the task."""
    choice: Literal["stochastic", "topk", "random"] = "stochastic"
    """gast: draw rows by their score, take the highest, or draw evenly."""
    score: Literal["inner", "cosine", "preconditioned"] = "inner"
    """gast: inner product of gradients, its cosine, or the inner product in Adam's metric."""
    pool: Literal["layer", "module"] = "layer"
    """gast: choose rows once per layer, or for each adapted module."""
    scale: Literal["mean", "sum"] = "mean"
    """gast: scale the chosen rows' gradients up to the whole batch, or leave their sum."""
    replacement: bool = False
    """gast: draw rows with replacement."""
    temperature: float = 1.0
    """gast: of the draw; high draws more evenly."""
    decay: float = 0.9
    """gast: share of the running mean of earlier gradients that stays in a step, for support momentum."""
    select_after: int = 0
    """gast: optimizer steps at the start that follow all rows, before rows are selected."""
    keep_scores: bool = False
    """gast: record every row's score in every layer, not the choices alone."""

    adapter: Literal["lora", "rslora", "dora", "full"] = "lora"
    """Kind of adapter; full: none, the weights of the chosen layers themselves train."""
    layers: tuple[int, ...] | None = None
    """Numbers of the decoder layers that train, from 0, negative from the end; all if not given, a kit's adapter layers
    for kits."""
    rank: int = 32
    """Rank of the adapter matrices."""
    alpha: int | None = None
    """Scale of the adapter response; twice the rank if not given, 16 for rslora."""
    dropout: float = 0.0
    """Dropout on the adapter input."""
    targets: tuple[str, ...] | None = None
    """Names of the modules that get adapters, such as q_proj v_proj; found in the model if not given."""

    lr: float = 5e-4
    """Peak learning rate."""
    batch_size: int = 16
    """Rows in a forward pass."""
    group_by_length: bool = False
    """Batch rows of like length: less padding, so faster, but rows of one kind then come together."""
    accumulate: int = 1
    """Forward passes in an optimizer step."""
    epochs: float = 1.0
    """Passes over the training rows."""
    steps: int | None = None
    """Optimizer steps; takes the place of epochs."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup: float = 0.03
    """Fraction of the steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decay of the adapter weights."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: int = 0
    """Seed of every random choice."""

    out: str | None = None
    """Run folder; runs/DATE-METHOD if not given."""
    resume: bool | str = False
    """Go on from the newest checkpoint in out, or from this checkpoint folder."""
    save_every: int | None = None
    """Optimizer steps between two checkpoints; only at the end if not given."""
    eval_every: int | None = None
    """Optimizer steps between two evaluations; after every epoch if not given."""
    log_every: int = 10
    """Optimizer steps between two log lines."""
    report_to: str = "none"
    """Experiment tracker by its transformers name, such as tensorboard or wandb."""


R = TypeVar("R", bound=Recipe)


def default_alpha(kind: str, rank: int) -> int:
    """Numerator of the adapter response's scale where none is given (ours).

    2·rank, a scale of 2, for LoRA and DoRA; 16 whatever the rank for rsLoRA, whose point is that the scale falls with
    √rank only.
    """
    return 16 if kind == "rslora" else 2 * rank


def resolve_recipe(recipe: R, now: datetime | None = None) -> R:
    """Fill in what depends on other fields: `alpha` from `rank`, `out` from the time and `method`."""
    now = now or datetime.now()
    return replace(
        recipe,
        alpha=_alpha(recipe),
        out=recipe.out or f"runs/{now:%Y%m%d-%H%M%S}-{recipe.method}",
    )


def _alpha(recipe: Recipe) -> int | None:
    if recipe.alpha is not None or recipe.adapter == "full":
        return recipe.alpha
    return default_alpha(recipe.adapter, recipe.rank)


def check(recipe: Recipe) -> None:
    """Check every range and what fields say about each other.

    Raises:
        RecipeError: With one sentence on the first value that cannot be used.
    """
    for keys, valid, words in _RANGES:
        for key in keys.split():
            value = getattr(recipe, key)
            if value is not None and not math.isfinite(value):
                raise RecipeError(f"{key} is {value}, but must be a finite number")
            if value is not None and not valid(value):
                raise RecipeError(f"{key} is {value}, but must be {words}")
    for fault, sentence in _faults(recipe):
        if fault:
            raise RecipeError(sentence)


def _faults(recipe: Recipe) -> list[tuple[bool, str]]:
    return [
        (not recipe.train, "no training data: give --train FILE, or `train: FILE` in the recipe"),
        (
            recipe.eval_every is not None and not recipe.eval,
            "eval_every needs held-out rows: give --eval FILE, or leave eval_every out",
        ),
        (
            recipe.resume is True and not recipe.out,
            "resume needs the run folder to go on with: give --out RUN, or --resume CHECKPOINT",
        ),
        (
            isinstance(recipe.select, float) and recipe.select > 1,
            f"select is {recipe.select}, but must be a whole number of rows, or a share of at most 1.0",
        ),
        (
            (recipe.support == "dataset") != (recipe.support_rows is not None),
            "support dataset and support_rows go together: give --support dataset --support-rows FILE, or neither",
        ),
        (
            recipe.replacement and recipe.choice == "topk",
            "replacement goes with choice stochastic or random: topk draws nothing",
        ),
        (recipe.targets == (), "targets is empty: name at least one module, or leave it out"),
        (recipe.layers == (), "layers is empty: give at least one number, or leave it out"),
    ]


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "limit eval_limit interval score_batch_size support_size rank batch_size accumulate",
        lambda v: v >= 1,
        "1 or more",
    ),
    ("steps save_every eval_every log_every", lambda v: v >= 1, "1 or more"),
    ("max_length", lambda v: v >= 2, "2 or more: a token to read and one to learn"),
    ("candidates", lambda v: v >= 2, "2 or more: a candidate is rewarded relative to the others"),
    ("active", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("suppressed", lambda v: 0 < v < 1, "above 0 and below 1"),
    ("factor dropout warmup decay", lambda v: 0 <= v < 1, "from 0 to below 1"),
    ("lr score_lr alpha epochs select", lambda v: v > 0, "above 0"),
    ("temperature", lambda v: v >= 1e-6, "0.000001 or more"),
    ("weight_decay clip select_after", lambda v: v >= 0, "0 or more"),
    ("seed", lambda v: 0 <= v < 2**32, "from 0 to 4294967295"),
)
