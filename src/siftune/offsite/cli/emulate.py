"""`siftune emulate`: compress a model's middle and write a kit that another party can tune."""

import shlex
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass
from rich.console import Console

from siftune.base.settings import CONFIG, NotNegative, Share
from siftune.base.stages import text_console
from siftune.methods.options import OWN
from siftune.offsite.exchange.calibration import CalibrationOptions, Dtype

if TYPE_CHECKING:
    import torch

    from siftune.offsite.emulator.plan import EmulatorSettings
    from siftune.offsite.kit.folder import Kit

PATHS = {"texts": ("calibration",), "rows": ("calibration_prompts",)}


@dataclass(kw_only=True, config=CONFIG)
class Options(CalibrationOptions):
    """Write a kit: a model whose middle is compressed, which another party can tune without having the model.

    The first and last layers go out as they are, to be tuned; the layers between are compressed so that these layers'
    gradients stay close to the model's own. `siftune audit` measures what the kit gives, and what it gives away.
    """

    keep: Share = 0.7
    """Fraction of the middle's parameters that the kit holds."""
    method: Literal["gradot", "layerdrop"] = "gradot"
    """gradot preserves the outer layers' gradients; layerdrop drops whole layers."""
    basis: Literal["whitened", "svd"] = "whitened"
    """gradot: directions to choose among: singular ones of the weights as the data and gradients see them, or plain."""
    mlp: Literal["refit", "channels"] = "refit"
    """gradot: refit takes channels out of MLPs, and the rest take over; channels only takes out."""
    parts: Literal["both", "attention", "mlp"] = "both"
    """What is compressed: attention and MLPs; or one of them, and --keep then holds for that part."""
    lambda_attn: NotNegative = 0.0
    """gradot: in attention, raises the emulator's own loss at the expense of similar gradients."""
    lambda_mlp: NotNegative = 0.0
    """gradot: the same in the MLPs."""
    lambda_unit: Literal["relative", "paper"] = "relative"
    """gradot: unit of both λ: relative to the means of the two terms, or the paper's, which needs smaller ones."""
    kit_dtype: Dtype = "auto"
    """Data type of the kit's frozen part; auto: the checkpoint's."""
    outer_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the layers to tune, also when they come back; float32 keeps small updates."""

    def check(self) -> None:
        """Check what can be checked before anything is loaded."""
        super().check()
        self.settings().check()

    def settings(self) -> "EmulatorSettings":
        """Settings of the emulator."""
        from siftune.offsite.emulator.model import Split
        from siftune.offsite.emulator.plan import EmulatorSettings

        return EmulatorSettings(
            method=self.method,
            keep=self.keep,
            parts=self.parts,
            lambda_attn=self.lambda_attn,
            lambda_mlp=self.lambda_mlp,
            lambda_unit=self.lambda_unit,
            basis=self.basis,
            mlp=self.mlp,
            split=Split(self.first, self.last),
            allot=self.allot,
        )


def run(options: Options) -> dict[str, Any]:
    """Write a kit and say what it is."""
    options.check()
    import torch

    from siftune.base.stages import stages
    from siftune.offsite.exchange.calibration import calibration_batches, calibration_facts, calibration_rows, load_base
    from siftune.offsite.exchange.emulate import KitOptions, check_base, emulate
    from siftune.offsite.kit.folder import facts

    console = text_console(stderr=True)
    started = time.monotonic()
    rows, settings = calibration_rows(options), options.settings()
    with stages(console, names=_stages(options, settings)) as progress:
        progress(f"loading {options.model}", 0, 0)
        model, tokenizer = load_base(options)
        kit_options = KitOptions(_kit_dtype(options, model), getattr(torch, options.outer_dtype))
        check_base(model, tokenizer, settings, kit_options)  # sampling texts takes minutes
        batches = calibration_batches(rows, model, tokenizer, options, progress)
        kit_options = replace(kit_options, calibration=calibration_facts(options, batches))
        kit = emulate(model, tokenizer, batches, options.out, settings, kit_options, progress)
    result = {**facts(kit), "seconds": round(time.monotonic() - started, 1)}
    _say(kit, result, options, console)
    return result


def _stages(options: Options, settings: "EmulatorSettings") -> list[str]:
    """Stages of the work after loading, in their order."""
    own = ["sampling texts", "scoring texts"] if options.calibration == OWN else []
    return [*own, "calibration", *(["costs"] if settings.measures else []), "compression"]


def _say(kit: "Kit", result: dict[str, Any], options: Options, console: Console) -> None:
    """Sum up, and name the next steps of both sides."""
    path, model = shlex.quote(str(kit.path)), shlex.quote(options.model)
    for line in (
        f"done in {result['seconds']:.0f} s: {100 * result['middle']['kept']:.1f} % of the middle's parameters kept",
        f"emulator {result['emulator_mb']:,.1f} MB, layers to tune {result['outer_mb']:,.1f} MB; "
        f"the base model would be {result['base_mb']:,.1f} MB in {result['dtype']}",
        f"kit in {kit.path}: hand out all of this folder, and nothing else",
        _identifiable(options),
        f"next, you: `siftune audit --model {model} --kit {path} --train FILE --eval FILE`, "
        "to see what the kit gives away",
        "the data owner: `siftune verify KIT`, `siftune train --model KIT --train FILE`, then return RUN/return",
        f"you again: `siftune plug --model {model} --kit {path} --return RETURN --out TUNED`",
    ):
        console.print(line, markup=False)


def _identifiable(options: Options) -> str:
    """A sentence on what the kit reveals of its calibration."""
    if options.calibration != OWN:
        what, option = "which rows calibrated a kit", "--calibration"
    else:
        what, option = "with which prompts the calibration texts of a kit begin", "--calibration-prompts"
    return f"whoever has the base model can tell {what}: give {option} text that may be known"


def _kit_dtype(options: Options, model: Any) -> "torch.dtype":
    """The kit's dtype: with auto the checkpoint's, but no wider than the model that is compressed."""
    import torch
    from transformers import AutoConfig

    from siftune.models.source import resolve

    if options.kit_dtype != "auto":
        return getattr(torch, options.kit_dtype)  # type: ignore[no-any-return]
    config = AutoConfig.from_pretrained(resolve(options.model), trust_remote_code=False)
    return min(model.dtype, config.dtype or model.dtype, key=lambda dtype: dtype.itemsize)  # type: ignore[no-any-return]
