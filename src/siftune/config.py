"""Recipes: what a training run does, as one flat dataclass.

The field below is the default, a YAML file overrides it, a command-line flag overrides both. The line under
each field is its `--help`. Nothing here imports torch, so `siftune --help` stays quick.
"""

import difflib
import math
import types
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from siftune.errors import RecipeError


@dataclass
class Recipe:
    """Fine-tune a language model with adapters, updating only the layers that count.

    A RECIPE.yaml sets any of the options below; flags override it.
    """

    model: str = "smollm2"
    """Model to tune: a folder, a hub id, or smollm2 (packaged, no hub needed)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights; auto: the checkpoint's, or float32 on a processor that lacks it."""

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

    method: Literal["dense", "rst", "ist"] = "ist"
    """Layers that train in a step: all (dense), drawn at random (rst), drawn by importance (ist)."""
    active: float = 0.25
    """rst, ist: fraction of the layers that train in a step."""
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

    adapter: Literal["lora", "rslora", "dora"] = "lora"
    """Kind of adapter."""
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

# names that other trainers use, so that the hint is right where spelling alone would not find it
_ELSEWHERE = {
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "checkpointing",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "max_seq_length": "max_length",
    "max_steps": "steps",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "batch_size",
    "r": "rank",
    "target_modules": "targets",
    "train_file": "train",
    "warmup_ratio": "warmup",
}


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `word` most likely stands for, or None."""
    names = list(names)
    word = word.replace("-", "_").lower()
    if _ELSEWHERE.get(word) in names:
        return _ELSEWHERE[word]
    close = difflib.get_close_matches(word, names, n=1)
    return close[0] if close else None


def wanted(hint: Any) -> str:
    """Say in words what values the type `hint` of a field admits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(part) for part in arguments)
    if origin is tuple:
        return "a list of names" if arguments[0] is str else f"a list, each {wanted(arguments[0])}"
    words = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
    return "nothing" if hint is type(None) else words.get(hint, getattr(hint, "__name__", str(hint)))


def load_recipe(*paths: str | Path, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Read YAML recipes; a later file overrides an earlier one, what none names keeps its default.

    Paths inside a recipe are relative to the working directory, as flags are.

    Args:
        paths: YAML files, each a flat mapping from field to value; an empty file is a recipe of defaults.
        kind: The dataclass to fill: `Recipe` or a subclass with further fields.

    Raises:
        RecipeError: A file is missing, unreadable or not YAML; a key is unknown or given twice; a value has
            the wrong type. The message names file, line and key.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for path in map(Path, paths):
        for key, (value, line) in _read(path).items():
            if key not in hints:
                raise RecipeError(f"{path}:{line}: unknown key {key!r}; {_hint(key, hints)}")
            try:
                values[key] = _convert(value, hints[key])
            except TypeError:
                found = f"{value!r} ({type(value).__name__})"
                raise RecipeError(f"{path}:{line}: {key} must be {wanted(hints[key])}, not {found}") from None
    return kind(**values)


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML, every field spelled out; `load_recipe` reads it back as it was."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


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
        alpha=default_alpha(recipe.adapter, recipe.rank) if recipe.alpha is None else recipe.alpha,
        out=recipe.out or f"runs/{now:%Y%m%d-%H%M%S}-{recipe.method}",
    )


def _hint(key: str, names: Iterable[str]) -> str:
    close = nearest(key, names)
    return f"did you mean {close!r}?" if close else "`siftune train --help` lists the keys"


def _read(path: Path) -> dict[str, tuple[Any, int]]:
    """Read one YAML file as key -> (value, line)."""
    try:
        return _entries(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist (looked in {Path.cwd()})") from None
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text: byte {error.start} is invalid") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}{_where(error)}: not valid YAML: {_problem(error)}") from None


def _entries(path: Path, text: str) -> dict[str, tuple[Any, int]]:
    """Walk the lines of a recipe; YAML itself would let the second of two like keys win in silence."""
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    entries: dict[str, tuple[Any, int]] = {}
    if node is None:
        return entries
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}:{node.start_mark.line + 1}: a recipe is made of lines `key: value`")
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{path}:{line}: a recipe is made of lines `key: value`")
        if key.value in entries:
            raise RecipeError(f"{path}:{line}: {key.value} is given twice, first in line {entries[key.value][1]}")
        entries[key.value] = (loader.construct_object(value, deep=True), line)
    return entries


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, or raise TypeError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for part in arguments:
            try:
                return _convert(value, part)
            except TypeError:
                continue
    elif origin is tuple and isinstance(value, list):
        return tuple(_convert(part, arguments[0]) for part in value)
    elif (origin is Literal and value in arguments) or type(value) is hint:
        return value
    elif hint is float and type(value) in (int, str):
        return _number(value)
    raise TypeError


def _number(value: int | str) -> float:
    """Read a float; YAML 1.1 takes `5e-4`, without a point, for text."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise TypeError from None


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
        (recipe.targets == (), "targets is empty: name at least one module, or leave it out"),
    ]


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("limit eval_limit interval score_batch_size rank batch_size accumulate", lambda v: v >= 1, "1 or more"),
    ("steps save_every eval_every log_every", lambda v: v >= 1, "1 or more"),
    ("max_length", lambda v: v >= 2, "2 or more: a token to read and one to learn"),
    ("candidates", lambda v: v >= 2, "2 or more: a candidate is rewarded relative to the others"),
    ("active", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("suppressed", lambda v: 0 < v < 1, "above 0 and below 1"),
    ("factor dropout warmup", lambda v: 0 <= v < 1, "from 0 to below 1"),
    ("lr score_lr alpha epochs", lambda v: v > 0, "above 0"),
    ("weight_decay clip", lambda v: v >= 0, "0 or more"),
    ("seed", lambda v: 0 <= v < 2**32, "from 0 to 4294967295"),
)
