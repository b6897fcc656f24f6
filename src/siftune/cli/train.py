"""`siftune train`: fine-tune from a recipe, from flags, or both."""

import logging
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from siftune.base.environment import launch_rank, launch_size
from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG
from siftune.base.text import visible
from siftune.cli.sources import kind_of, source_of
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe
from siftune.sifting.checks import PoolShare, check_sifting
from siftune.train.folder.checkpoints import named_checkpoint
from siftune.train.folder.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from siftune.recipe.training_rows import Read
    from siftune.train.run import Run

logger = logging.getLogger(__name__)


@dataclass(config=CONFIG)
class Options(Recipe):
    """Fine-tune a language model, or a kit of one.

    For example:

        siftune train --train rows.jsonl --eval-share 0.05
        siftune train --model HUB_ID --train pool.jsonl --target few.jsonl --sift --eval heldout.jsonl
        siftune train recipe.yaml --lr 1e-3 --out runs/second

    Give recipe files (.yaml), flags, or both: flags override recipes, a later recipe an earlier one.
    """

    sift: bool | PoolShare = False
    """Before training, select the rows of the pool that are like the target's, as siftune sift does. A number: the
    share of the pool to select, or how many rows. LoRA then continues with the adapter that scored the rows."""
    avoid: str | None = None
    """Before training, leave out the rows of the pool that are like these, at least 8 rows with answers that the model
    must not give: a file or hub id."""
    dry_run: bool = False
    """Train nothing: validate the data, preview the loss mask of three rows, and measure the memory of a step."""


def run(options: Options) -> dict[str, Any]:
    """Train, and say what is where."""
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    _check(options, recipe)
    if options.dry_run:
        return _try(options, recipe)

    from siftune.base.ranks import in_launch
    from siftune.base.stages import text_console
    from siftune.base.text import counted
    from siftune.train.run import train

    console = text_console(stderr=True)
    with in_launch():
        recipe, read = _sifted(options, recipe, console)
        finished = train(recipe, source_of=source_of, read=read)
    if launch_rank():
        return {}
    summary, path = finished.summary, finished.folder.path
    console.print(
        f"done: {counted(summary['steps'], 'step')}{_since(summary)} in {summary['seconds']:.0f} s, {_losses(summary)}"
        f"peak {summary['peak_memory_mb']:,.0f} MB\n"
        f"{_followed(summary['followed'])}"
        f"{_whereabouts(finished, recipe)}",
        markup=False,
    )
    _warn_of_rise(summary, recipe)
    left = {"adapter": finished.folder.adapter, "return": finished.folder.returned}
    return {"run": path, **{name: folder for name, folder in left.items() if folder.exists()}, **summary}


def _check(options: Options, recipe: Recipe) -> None:
    """Check what needs neither rows nor model, before torch is imported."""
    check(recipe)
    if _sifts(options, recipe):
        check_sifting(recipe, _share(options), options.avoid)
    if isinstance(recipe.resume, str):
        named_checkpoint(recipe.resume, hashes=False)
    if recipe.out is not None and not options.dry_run:
        RunFolder(Path(recipe.out).expanduser(), create=False).refuse_results(recipe.resume is not False)


def _sifted(options: Options, recipe: Recipe, console: "Console") -> "tuple[Recipe, Read | None]":
    """The recipe without the rows that sifting leaves out, and its rows if sifting has read them."""
    from siftune.cli.sift import text_of
    from siftune.sifting.sift import sift_first

    if not _sifts(options, recipe):
        return recipe, None
    recipe, sifted, read = sift_first(
        recipe, _share(options), console, source_of, options.avoid, options.sift is not False
    )
    if not launch_rank():
        console.print(text_of(sifted), markup=False)
        if options.from_adapter is None and recipe.from_adapter is not None:
            console.print(f"the training continues with the adapter in {recipe.from_adapter}", markup=False)
    return recipe, read


def _sifts(options: Options, recipe: Recipe) -> bool:
    """Whether to sift. A run that is resumed has done so already, and its recipe names the rows to leave out."""
    asked = options.sift is not False or options.avoid is not None
    return asked and not (recipe.drop_rows is not None and recipe.resume)


def _share(options: Options) -> int | float | None:
    return None if isinstance(options.sift, bool) else options.sift


def _try(options: Options, recipe: Recipe) -> dict[str, Any]:
    """Say what training would do."""
    from siftune.base.stages import text_console
    from siftune.report.dry_run import shown
    from siftune.train.dry_run import dry_run

    if launch_size() > 1:
        raise RecipeError("a dry run is of one process: start it without torchrun")
    console = text_console(stderr=True)
    if _sifts(options, recipe):
        console.print("a dry run does not sift: rows and steps are those of the complete pool")
    trial = dry_run(recipe, console, source_of)
    console.print(shown(trial))
    return trial.to_dict()


def _since(summary: dict[str, Any]) -> str:
    """The first step of the measured time, in a resumed run."""
    step = summary.get("resumed_step")
    return "" if step in (None, summary["steps"]) else f", those after {step}"


def _losses(summary: dict[str, Any]) -> str:
    """Say what training came to."""
    first, last, held_out = (summary[name] for name in ("loss_first", "loss_last", "eval_loss"))
    losses = "" if last is None else f"loss {first:.4f}, " if first == last else f"loss {first:.4f} to {last:.4f}, "
    kept = f" at step {summary['kept_step']}, which is kept" if "kept_step" in summary else ""
    earlier = f" after step {summary['eval_step']}" if "eval_step" in summary else ""
    return losses if held_out is None else f"{losses}held-out loss {held_out:.4f}{kept}{earlier}, "


_RISE = 1.0  # nats per label token by which the last loss is above the first, at least (ours)


def _warn_of_rise(summary: dict[str, Any], recipe: Recipe) -> None:
    """Warn if the loss has risen, as at too high a rate; not if the weights of an earlier step are kept."""
    first, last = summary["loss_first"], summary["loss_last"]
    if last is not None and "kept_step" not in summary and last >= first + _RISE:
        rate = "" if recipe.lr is None else f", now {recipe.lr:g}"
        message = "the loss rose from %.2f to %.2f: unless the last rows are harder than the first, lower --lr%s"
        logger.warning(message, first, last, rate)


def _followed(shares: dict[str, float]) -> str:
    """Say what was followed, where rows were chosen: of each source, where rows say what theirs is."""
    from siftune.data.target import OTHER

    if [*shares] == [OTHER]:
        return f"followed: {shares[OTHER]:.0%} of the rows seen\n"
    parts = [f"{visible(source)} {share:.0%}" for source, share in shares.items()]
    return f"share of rows followed: {', '.join(parts)}\n" if parts else ""


def _whereabouts(finished: "Run", recipe: Recipe) -> str:
    """Say what is where, and what to do next."""
    from siftune.models.adapters.registry import ADAPTER_TYPES

    path, adapter = finished.folder.path, finished.folder.adapter
    lines = [f"adapter in {adapter}"] if adapter.exists() else []
    if (kind := kind_of(finished.folder.returned)) is not None:
        return "\n".join([*lines, *kind.next_steps(recipe, finished.folder, finished.summary["steps"])])
    rows = " --data FILE" if finished.summary["eval_loss"] is None else ""
    merges = recipe.adapter == "full" or ADAPTER_TYPES[recipe.adapter].unmergeable is None
    run = shlex.quote(str(path))
    export = [f"export {run}"] if merges else []
    commands = (f"eval {run}{rows}", f"report {run}", *export, f"ask {run} PROMPT")
    return "\n".join([*lines, f"next: {', '.join(f'`siftune {command}`' for command in commands)}"])
