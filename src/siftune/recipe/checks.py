"""Recipe validation: options that contradict each other.

Ranges are in the types of the fields. Nothing here imports torch, so errors come at once.
"""

from collections.abc import Iterable
from pathlib import Path

from siftune.base.errors import RecipeError
from siftune.base.settings import Settings, nearest
from siftune.base.text import counted
from siftune.methods import METHODS, all_parts
from siftune.methods.options import OWN, selects_all
from siftune.models.adapters.registry import not_taken
from siftune.recipe.schema import Recipe, compares, holds_out, method_of, settings_of, target_comes_last, train_files

NO_TRACKER = "none"
TRACKERS = (  # that transformers has; it would have to be imported to name them
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)


def check(recipe: Recipe) -> None:
    """Refuse options that contradict each other.

    Raises:
        RecipeError: With one sentence on the first contradiction.
    """
    faults = (
        *(_faults, _target_faults, _row_faults, _start_faults, _private_faults, _keep_faults, _tracker_faults),
        *(_idle, _all_rows),
    )
    for is_wrong, sentence in (pair for part in faults for pair in part(recipe)):
        if is_wrong:
            raise RecipeError(sentence)


def refuse_all_weights(recipe: Recipe) -> None:
    """Refuse to train all weights of a model in every step.

    Raises:
        RecipeError: The adapter is "full", there are no `layers`, and the method does not choose layers.
    """
    chooses = any(not part.rows for part in method_of(recipe).parts)
    if recipe.adapter == "full" and recipe.layers is None and not chooses:
        raise RecipeError(
            "adapter is full and no layers are given: training all weights of a model is not what siftune is for; "
            "give --layers, such as 0 1 -2 -1, an adapter such as lora, or a method that chooses layers, such as rst"
        )


def _faults(recipe: Recipe) -> list[tuple[bool, str]]:
    return [
        (not recipe.train and recipe.resume is not False, _no_recipe(recipe.resume)),
        (not recipe.train, "no training data: give --train FILE, or `train: FILE` in the recipe"),
        (
            recipe.eval_every is not None and not holds_out(recipe),
            "eval_every needs held-out rows: give --eval FILE or --eval-share 0.05, or leave eval_every out",
        ),
        (
            recipe.patience is not None and not holds_out(recipe),
            "patience waits for less held-out loss: give --eval FILE or --eval-share 0.05, or leave patience out",
        ),
        (
            recipe.resume is True and not recipe.out,
            "resume needs a run folder: give --out RUN, or --resume CHECKPOINT",
        ),
        (
            recipe.compile and not _can_compile(recipe),
            "compile goes with adapters lora, rslora and full, without quantize and sharding: leave compile or the "
            "others out",
        ),
        (recipe.targets == (), "targets is empty: name at least one module, or leave it out"),
        (recipe.layers == (), "layers is empty: give at least one number, or leave it out"),
    ]


def _no_recipe(resume: bool | str) -> str:
    """The sentence on a run to resume that has no recipe."""
    if isinstance(resume, bool):
        return "resume needs a run folder: give --resume RUN, which uses the run's own recipe"
    if not Path(resume).expanduser().exists():
        return f"run folder {resume} does not exist (working directory: {Path.cwd()})"
    return (
        f"{resume} has no recipe.yaml, so it is no run folder: give --resume RUN, or a checkpoint with its run's "
        "recipe: RUN/recipe.yaml --resume CHECKPOINT"
    )


def _can_compile(recipe: Recipe) -> bool:
    plain = recipe.quantize is None and recipe.sharding == "none"
    return plain and recipe.adapter in ("lora", "rslora", "full")


def _target_faults(recipe: Recipe) -> list[tuple[bool, str]]:
    """What is wrong with a target, and with rows to compare with."""
    return [
        (
            recipe.target is not None and _is_of(recipe.target, train_files(recipe)),
            f"target {recipe.target} is also a file of the training rows: give a file of correct rows alone",
        ),
        (
            recipe.target is not None and _could_compare(recipe) and not compares(recipe),
            "with a target, rows are compared with its rows (gast.support dataset): leave gast.support out",
        ),
        *(
            (
                getattr(recipe, name) != getattr(Recipe, name) and recipe.target is None,
                f"{name} has no effect without a target: leave it out, or give --target FILE",
            )
            for name in ("target_last", "target_share")
        ),
        (
            recipe.target_last not in (None, 1) and not recipe.target_share,
            "target_last says when a target's rows come, but with target_share 0 they are not trained on: leave one of "
            "them out",
        ),
        (
            recipe.group_by_length and target_comes_last(recipe) < 1,
            "group_by_length puts rows in an order of its own, but a target's rows come last: leave it out, or give "
            "--target-last 1",
        ),
        (
            recipe.target is None and compares(recipe),
            "support dataset compares rows with a target's: give --target FILE (with --target-share 0 to compare only)",
        ),
    ]


def _is_of(file: str, files: Iterable[str]) -> bool:
    return Path(file).expanduser().resolve() in {Path(each).expanduser().resolve() for each in files}


def _could_compare(recipe: Recipe) -> bool:
    """Whether a recipe's method can compare rows with others."""
    return any(part.rows for part in method_of(recipe).parts)


def _row_faults(recipe: Recipe) -> Iterable[tuple[bool, str]]:
    """What is wrong with how rows are put together and divided."""
    yield (
        bool(recipe.eval) and recipe.eval_share > 0,
        "eval and eval_share both say what rows are held out: give one of them",
    )


def _start_faults(recipe: Recipe) -> Iterable[tuple[bool, str]]:
    """What does not go with how the base and the adapter begin."""
    full = recipe.adapter == "full"
    for name in ("quantize", "from_adapter", "rank", "alpha", "dropout", "targets"):
        yield (
            full and getattr(recipe, name) != getattr(Recipe, name),
            f"{name} is for adapters, and adapter full has none: leave {name} out, or take --adapter lora",
        )
    if not full:
        yield from ((True, sentence) for sentence in not_taken(recipe.adapter, recipe))
    yield (
        recipe.sharding == "fsdp" and recipe.quantize is not None,
        "sharding fsdp cannot divide weights that quantize has rounded: leave one of them out",
    )
    for name in ("layers", "targets"):
        yield (
            recipe.from_adapter is not None and getattr(recipe, name) is not None,
            f"{name} is set by the adapter in from_adapter: leave {name} out",
        )


def _private_faults(recipe: Recipe) -> Iterable[tuple[bool, str]]:
    """What does not go with differential privacy, and what goes with nothing else."""
    if recipe.dp_epsilon is None:
        for name, default in (("dp_delta", None), ("dp_clip", Recipe.dp_clip)):
            yield (
                getattr(recipe, name) != default,
                f"{name} has no effect without dp_epsilon: leave it out, or give --dp-epsilon",
            )
        return
    yield (
        any(part.by_data for part in method_of(recipe).parts),
        f"method {recipe.method} looks at gradients or losses of the rows to choose, which no noise covers: with "
        f"dp_epsilon take --method {', '.join(_blind())}",
    )
    yield (
        recipe.target is not None,
        "target repeats its rows among the training rows, but dp_epsilon is a promise about a row that is there once: "
        "leave one of them out",
    )
    yield (
        recipe.from_adapter is not None,
        "dp_epsilon does not count what the adapter of from_adapter learned: leave one of them out; an adapter of "
        "other rows can be merged into the base with siftune export",
    )
    yield (
        recipe.dp_delta is None,
        "dp_epsilon needs dp_delta, the chance that the promise fails: give --dp-delta, well below one over the number "
        "of training rows",
    )
    yield (
        recipe.group_by_length,
        "group_by_length puts rows together by what they are, but with dp_epsilon every row is drawn by itself: leave "
        "group_by_length out",
    )


def _keep_faults(recipe: Recipe) -> Iterable[tuple[bool, str]]:
    """What does not go with texts on which predictions are kept: the base must be the model without its adapters."""
    if recipe.keep is None:
        yield (
            recipe.keep_weight != Recipe.keep_weight,
            "keep_weight has no effect without keep: leave it out, or give --keep own",
        )
        return
    reasons = {
        "dp_epsilon": (recipe.dp_epsilon is not None, "no noise covers the penalty's gradient"),
        "sharding": (recipe.keep == OWN and recipe.sharding != "none", "a sharded base cannot write texts"),
        "from_adapter": (recipe.from_adapter is not None, "the penalty would undo what that adapter has learned"),
    }
    for name, (is_wrong, why) in reasons.items():
        yield is_wrong, f"keep does not go with {name}, since {why}: leave one of them out"


def _tracker_faults(recipe: Recipe) -> Iterable[tuple[bool, str]]:
    """What is wrong with the names of trackers; whether their packages are there is checked before training."""
    names = recipe.report_to
    yield (
        names != (NO_TRACKER,) and (not names or NO_TRACKER in names),
        "report_to names trackers, or none and nothing else: leave it out to report to none",
    )
    for name in names:
        close = nearest(name, TRACKERS)
        hint = f"did you mean {close!r}?" if close else f"use one of {', '.join(TRACKERS)}, or none"
        yield "," in name, f"report_to has {name!r}: put spaces between trackers, not commas"
        yield name not in (*TRACKERS, NO_TRACKER), f"report_to has the unknown tracker {name!r}; {hint}"


def _blind() -> list[str]:
    """Methods whose choices do not look at the rows."""
    return [name for name, method in METHODS.items() if not any(part.by_data for part in method.parts)]


def _idle(recipe: Recipe) -> Iterable[tuple[bool, str]]:
    """Options of methods that are not chosen: refused, since somebody meant them to do something."""
    chosen = method_of(recipe).parts
    for part in all_parts():
        settings, default = getattr(recipe, part.settings.group), part.settings().to_dict()
        aimed = {**default, **part.settings.with_target} if recipe.target else default
        for name in () if part in chosen else Settings.names(part.settings):
            key, value = f"{part.settings.group}.{name}", getattr(settings, name)
            methods = " or ".join(name for name, method in METHODS.items() if part in method.parts)
            yield (
                value not in (default[name], aimed[name]),
                f"{key} is {value}, which has no effect with method {recipe.method}: leave it out, or take --method "
                f"{methods}",
            )


def _all_rows(recipe: Recipe) -> Iterable[tuple[bool, str]]:
    """Methods that choose rows, of batches that have no more than are followed."""
    for part, settings in zip(method_of(recipe).parts, settings_of(recipe), strict=True):
        group, select = settings.group, getattr(settings, "select", 1.0)
        fewer = f", or a --{group}.select below {select}" if isinstance(select, int) and recipe.batch_size > 1 else ""
        yield (
            part.rows and selects_all(settings, recipe.batch_size),
            f"{group}.select {select} follows every row of a forward pass of {counted(recipe.batch_size, 'row')}, so "
            f"none is left out: give a larger --batch-size{fewer}",
        )
