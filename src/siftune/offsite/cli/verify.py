"""`siftune verify`: check a kit or a return, and say what it holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic.dataclasses import dataclass
from rich.console import Console

from siftune.base.errors import KitError
from siftune.base.settings import CONFIG, Positive, Validated
from siftune.base.stages import text_console
from siftune.cli.options import Flag
from siftune.offsite.cli.paths import refuse_swapped
from siftune.offsite.exchange.settings import MAX_UPDATE

if TYPE_CHECKING:
    from siftune.offsite.kit.folder import Kit

PATHS = {"folders": ("path", "kit")}


@dataclass(config=CONFIG)
class Options(Validated):
    """Check a kit, or with --kit a return for it: files, hashes, shapes and numbers.

    A kit is what `siftune emulate` writes, a return what `siftune train --model KIT` leaves behind.
    """

    path: Annotated[Path, Flag("folder", positional=True)]
    """Folder of the kit or of the return."""
    kit: Path | None = None
    """Kit that a return is for."""
    max_update: Positive = MAX_UPDATE
    """For a return: each tensor must have moved by less, relative to its norm, as for siftune plug."""


def run(options: Options) -> dict[str, Any]:
    """Check, and print what it is."""
    if options.kit is not None:
        refuse_swapped(options.kit)
    from siftune.offsite.kit.folder import is_kit, read_kit

    console = text_console()
    if is_kit(options.path):
        if options.kit is not None:
            raise KitError(f"{options.path} is a kit itself: leave out --kit, which names the kit of a return")
        if options.max_update != MAX_UPDATE:
            raise KitError(f"{options.path} is a kit: leave out --max-update, which is about returns")
        return _show_kit(read_kit(options.path), console)
    if options.kit is None:
        if not options.path.is_dir():
            raise KitError(f"there is no folder {options.path}: give the folder of a kit or of a return")
        raise KitError(f"{options.path} is no kit; if it is a return, name its kit with --kit")
    return _show_return(options, read_kit(options.kit), console)


def _show_kit(kit: "Kit", console: Console) -> dict[str, Any]:
    from siftune.offsite.kit.folder import facts
    from siftune.offsite.kit.tokenizer import TEMPLATE

    figures = facts(kit)
    split, middle, outer = figures["split"], figures["middle"], figures["outer"]
    rows = {
        "kit": f"{kit.path} is sound",
        "digest": kit.digest,
        "base": f"{figures['model_type']}, {figures['layers']} layers",
        "to tune": f"first {split['first']} and last {split['last']} layers: {outer['tensors']} tensors in "
        f"{outer['dtype']}, {figures['outer_mb']:,.1f} MB",
        "between": f"{middle['layers']} layers for {middle['of']}, {100 * middle['kept']:.1f} % of their parameters",
        "frozen": f"{figures['emulator_mb']:,.1f} MB in {figures['dtype']}; all of the base would be "
        f"{figures['base_mb']:,.1f} MB",
        "calibration": f"{kit.manifest.calibration}: the owner's word",
        "chats": "with a chat template" if TEMPLATE in kit.manifest.files else "no chat template",
    }
    _show(rows, console)
    return figures


def _show_return(options: Options, kit: "Kit", console: Console) -> dict[str, Any]:
    from siftune.offsite.cli.updates import show_updates
    from siftune.offsite.exchange.returned import open_return, ranks_of
    from siftune.offsite.exchange.updates import check_return
    from siftune.offsite.kit.manifest import in_words

    with open_return(options.path, kit) as returned:
        report = check_return(kit, returned, options.max_update)
        promise, ranks, count = returned.privacy, ranks_of(returned), str(len(returned))
    if ranks:
        count = f"factors of {len(ranks)} matrices, of rank {max(ranks.values())} at most"
    rows = {"return": f"{options.path} is sound", "kit": f"{kit.path}, {kit.digest}", "tensors": count}
    _show(rows | ({"privacy": in_words(promise)} if promise else {}), console)
    show_updates(report)
    more = ({"privacy": promise} if promise else {}) | ({"ranks": ranks} if ranks else {})
    return {"return": options.path, "kit": kit.path, "digest": kit.digest, **more, **report.to_dict()}


def _show(rows: dict[str, str], console: Console) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"{name:<{width}}  {value}", markup=False)
