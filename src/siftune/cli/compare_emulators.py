"""`siftune compare-emulators`: compare emulators of a model, for its owner to choose one."""

import time
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass
from rich.text import Text

from siftune.base.settings import CONFIG, Count
from siftune.base.stages import text_console
from siftune.offsite.exchange.calibration import CalibrationOptions

if TYPE_CHECKING:
    from siftune.offsite.audits.sweep import SweepGrid


@dataclass(kw_only=True, config=CONFIG)
class Options(CalibrationOptions):
    """Compare emulators of a model: how like its own the gradients are, against how much worse the emulator is.

    Every method is tried at every kept fraction; gradot also with every basis, λ and treatment of the MLPs. A table
    and the figures are written, and no kit: `siftune emulate` makes one.
    """

    keeps: tuple[float, ...] = (0.7, 0.5, 0.3)
    """Kept fractions."""
    lambdas: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Values of λ, for gradot."""
    bases: tuple[Literal["whitened", "svd"], ...] = ("whitened", "svd")
    """Bases, for gradot."""
    mlps: tuple[Literal["refit", "channels"], ...] = ("refit",)
    """Treatments of the MLPs, for gradot."""
    methods: tuple[Literal["gradot", "layerdrop"], ...] = ("gradot", "layerdrop")
    """Methods."""
    held_out: str | None = None
    """Rows to measure on, as for --calibration; if not given, the rows that follow those used there."""
    held_out_rows: Count = 16
    """Use only the first N of them."""

    def check(self) -> None:
        """Check what can be checked before anything is loaded."""
        super().check()
        self.grid().check()

    def grid(self) -> "SweepGrid":
        """The emulators to compare."""
        from siftune.offsite.audits.sweep import SweepGrid
        from siftune.offsite.emulator.model import Split

        return SweepGrid(
            keeps=self.keeps,
            lambdas=self.lambdas,
            bases=self.bases,
            mlps=self.mlps,
            methods=self.methods,
            split=Split(self.first, self.last),
            allot=self.allot,
        )


def run(options: Options) -> dict[str, Any]:
    """Make and measure emulators; write the table."""
    options.check()
    from siftune.base.files import new_folder
    from siftune.base.stages import stages
    from siftune.offsite.audits.sweep import sweep
    from siftune.offsite.exchange.calibration import (
        batches_of,
        calibration_and_held_out,
        calibration_batches,
        calibration_facts,
        load_base,
    )
    from siftune.report.sweep import base_loss, table, to_dict, write_sweep
    from siftune.report.table import print_table

    console = text_console(stderr=True)
    started = time.monotonic()
    rows, held_out = calibration_and_held_out(options, options.held_out, options.held_out_rows)
    with new_folder(options.out) as folder:
        with console.status(Text(f"loading {options.model}")):
            model, tokenizer = load_base(options)
        measured = batches_of(held_out, model, tokenizer, options)
        with stages(console) as progress:
            batches = calibration_batches(rows, model, tokenizer, options, progress)
            points = sweep(model, batches, measured, options.grid(), progress)
        used = calibration_facts(options, batches)
        facts = {
            "model": options.model, "calibration": str(used), "calibration_rows": used.number,
            "held_out_rows": len(held_out), "max_length": options.longest_row, "first": options.first,
            "last": options.last, "allot": options.allot,
        }  # fmt: skip
        write_sweep(points, folder, facts)
    shown = text_console()
    print_table(table(points), shown)
    shown.print(base_loss(points), markup=False)
    seconds = round(time.monotonic() - started, 1)
    console.print(
        f"done in {seconds:.0f} s: table and figures in {options.out}; `siftune report {options.out}` draws them",
        markup=False,
    )
    return {"folder": options.out, **to_dict(points, facts), "seconds": seconds}
