"""`siftune emulate`: compress a model's middle and write a kit that another party can tune, or compare kits."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from siftune.errors import DataError, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from siftune.data.rows import Row
    from siftune.offsite.audits.sweep import SweepGrid
    from siftune.offsite.emulator.plan import EmulatorSettings
    from siftune.offsite.kit.folder import Kit

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class Options:
    """Write a kit: a model whose middle is compressed, which another party can tune without having the model.

    The first and last layers go out as they are, to be tuned; the layers between are compressed so that these layers'
    gradients stay like the model's own. With --sweep no kit is written, but a table and a picture to choose by.
    """

    calibration: str
    """Rows of text that the model is looked at with: a .jsonl, .json, .csv or .parquet file, or a hub id."""
    out: Path
    """Folder of the kit, or with --sweep of table and picture; must be new or empty."""
    model: str = "smollm2"
    """Model to compress: a folder, a hub id, or smollm2."""
    keep: float | None = None
    """Fraction of the middle's parameters that the kit holds; 0.7 if --size-mb is not given either."""
    size_mb: float | None = None
    """In place of --keep: size of emulator.safetensors in MB."""
    method: Literal["gradot", "layerdrop", "crash", "svd+flap"] = "gradot"
    """gradot keeps the adapter's gradients; layerdrop drops whole layers, crash shares them, svd+flap keeps outputs."""
    basis: Literal["whitened", "svd"] = "whitened"
    """gradot: directions to choose among: singular ones of the weights as the data and gradients see them, or plain."""
    mlp: Literal["refit", "channels", "factors"] = "refit"
    """gradot: refit takes channels out of MLPs, and the rest take over; channels only takes out; factors decomposes."""
    lambda_attn: float = 0.0
    """gradot: weight of a large loss of the emulator by itself against like gradients, in attention."""
    lambda_mlp: float = 0.0
    """gradot: the same in the MLPs."""
    allot: Literal["uniform", "score"] = "uniform"
    """gradot, svd+flap: keep the same share of all layers, or more of those that matter more."""
    first: int = 2
    """Layers next to the embeddings that are to be tuned."""
    last: int = 2
    """Layers before the head that are to be tuned."""
    rows: int = 32
    """Use the first so many rows."""
    max_length: int = 128
    """Longest row in tokens; what is over is cut off."""
    batch_size: int = 4
    """Rows in a forward and backward pass."""
    completion_only: bool = False
    """Look at the completions alone, not at the prompts."""
    split: str = "train"
    """Split of --calibration, where it has splits."""
    format: Literal["auto", "prompt", "messages", "alpaca", "text"] = "auto"
    """Columns of the rows: prompt and completion; messages; instruction, input and output; or text."""
    template: Literal["auto", "chat", "none"] = "auto"
    """Chat template: auto uses the tokenizer's if it has one, chat demands it, none leaves text as it is."""
    dtype: Dtype = "auto"
    """Number format to compute in; auto: the checkpoint's, or float32 on a processor that lacks it."""
    kit_dtype: Dtype = "auto"
    """Number format of the kit's frozen part; auto: the checkpoint's."""
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the layers to tune, also when they come back; float32 keeps small updates."""
    sign: Path | None = None
    """Private key, a PEM file, to sign the kit with."""
    sweep: bool = False
    """Compare emulators in place of writing a kit: like gradients against loss gap, over the options below."""
    keeps: tuple[float, ...] = (0.7, 0.5, 0.3)
    """sweep: kept fractions."""
    lambdas: tuple[float, ...] = (0.0, 0.1, 0.3)
    """sweep: values of λ, for gradot."""
    lambda_on: tuple[Literal["both", "attn", "mlp"], ...] = ("both",)
    """sweep: where λ acts."""
    bases: tuple[Literal["whitened", "svd"], ...] = ("whitened", "svd")
    """sweep: bases, for gradot."""
    mlps: tuple[Literal["refit", "channels", "factors"], ...] = ("refit",)
    """sweep: what is done to the MLPs, for gradot."""
    methods: tuple[Literal["gradot", "layerdrop", "crash", "svd+flap"], ...] = ("gradot", "layerdrop")
    """sweep: methods."""
    held_out: str | None = None
    """sweep: rows to measure on, as for --calibration; if not given, the rows that follow those used there."""
    held_out_rows: int = 16
    """sweep: use the first so many of them."""


_FOR_KITS = (
    "keep",
    "size_mb",
    "method",
    "basis",
    "mlp",
    "lambda_attn",
    "lambda_mlp",
    "kit_dtype",
    "adapter_dtype",
    "sign",
)
_FOR_SWEEPS = ("keeps", "lambdas", "lambda_on", "bases", "mlps", "methods", "held_out", "held_out_rows")


def run(options: Options) -> dict[str, Any]:
    """Write a kit, or compare."""
    _check(options)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return _compare(options, console) if options.sweep else _write(options, console)


def _check(options: Options) -> None:
    """Check what can be checked before anything is loaded."""
    from siftune.files import refuse_full

    for name, least in (("rows", 1), ("max_length", 2), ("batch_size", 1), ("held_out_rows", 1)):
        if getattr(options, name) < least:
            raise RecipeError(f"--{_flag(name)} is {getattr(options, name)}, but must be {least} or more")
    if options.keep is not None and options.size_mb is not None:
        raise RecipeError("--keep and --size-mb were both given: give one of them")
    for name in _FOR_KITS if options.sweep else _FOR_SWEEPS:
        if getattr(options, name) != Options.__dataclass_fields__[name].default:
            advice = "--sweep writes no kit: leave one of the two out" if options.sweep else "it goes with --sweep"
            raise RecipeError(f"--{_flag(name)} would have no effect; {advice}")
    if options.sweep:
        _grid(options).check()
    else:
        _settings(options, 0.7 if options.keep is None else options.keep).check()
    if options.sign is not None:
        from siftune.offsite.kit.signing import load_signer

        load_signer(options.sign)
    refuse_full(options.out)


def _write(options: Options, console: Console) -> dict[str, Any]:
    """Write a kit and say what it is."""
    import torch

    from siftune.cli.stages import stages
    from siftune.cli.verify import facts
    from siftune.offsite.emulator.plan import keep_for_size
    from siftune.offsite.protocol.emulate import KitOptions, emulate

    started = time.monotonic()
    rows = _load_rows(options.calibration, options, options.rows)
    model, tokenizer, batches = _load(options, rows, console)
    dtype = _kit_dtype(options, model)
    keep = 0.7 if options.keep is None else options.keep
    if options.size_mb is not None:
        keep = keep_for_size(model, _split(options), options.size_mb * 1e6, dtype.itemsize)
    kit_options = KitOptions(dtype, getattr(torch, options.adapter_dtype), options.sign)
    with stages(console) as progress:
        kit = emulate(model, tokenizer, batches, options.out, _settings(options, keep), kit_options, progress)
    seconds = round(time.monotonic() - started, 1)
    result = {**facts(kit), "seconds": seconds}
    _say(kit, result, options, console)
    return result


def _say(kit: "Kit", result: dict[str, Any], options: Options, console: Console) -> None:
    """Sum up, and name the next steps of both sides."""
    for line in (
        f"done in {result['seconds']:.0f} s: {100 * result['middle']['kept']:.1f} % of the middle's parameters kept",
        f"emulator {result['emulator_mb']:,.1f} MB, layers to tune {result['adapter_mb']:,.1f} MB; "
        f"the base model would be {result['base_mb']:,.1f} MB in {result['dtype']}",
        f"kit in {kit.path}: hand out all of this folder, and nothing else",
        f"next, you: `siftune audit --model {options.model} --kit {kit.path} --train FILE --eval FILE`, "
        "to see what the kit gives away",
        "the data owner: `siftune verify KIT`, then `siftune train --model KIT --train FILE`, and sends RUN/return",
        f"you again: `siftune plug --model {options.model} --kit {kit.path} --return RETURN --out TUNED`",
    ):
        console.print(line, markup=False)


def _compare(options: Options, console: Console) -> dict[str, Any]:
    """Make and measure emulators; write table and picture."""
    import matplotlib  # noqa: F401 - a missing package is told before the work

    from siftune.cli.stages import stages
    from siftune.files import new_folder
    from siftune.offsite.audits.sweep import sweep
    from siftune.report.sweep import table, to_dict, write_sweep

    started = time.monotonic()
    rows, held_out = _both_rows(options)
    with new_folder(options.out) as folder:
        model, tokenizer, batches = _load(options, rows, console)
        measured = _batches(options, held_out, tokenizer)
        with stages(console) as progress:
            points = sweep(model, batches, measured, _grid(options), progress)
        facts = {
            "model": options.model, "calibration_rows": len(rows), "held_out_rows": len(held_out),
            "max_length": options.max_length, "first": options.first, "last": options.last, "allot": options.allot,
        }  # fmt: skip
        write_sweep(points, folder, facts)
    Console(highlight=False, soft_wrap=True).print(table(points), markup=False)
    seconds = round(time.monotonic() - started, 1)
    console.print(f"done in {seconds:.0f} s: table, figures and picture in {options.out}", markup=False)
    return {"folder": options.out, **to_dict(points, facts), "seconds": seconds}


def _both_rows(options: Options) -> "tuple[list[Row], list[Row]]":
    """Rows to calibrate on, and others to measure on."""
    if options.held_out is not None:
        rows = _load_rows(options.calibration, options, options.rows)
        return rows, _load_rows(options.held_out, options, options.held_out_rows)
    rows = _load_rows(options.calibration, options, options.rows + options.held_out_rows)
    if len(rows) <= options.rows:
        raise DataError(
            f"{options.calibration} has {len(rows)} rows, all of which --rows {options.rows} uses for calibration: "
            "give other rows to measure on with --held-out FILE, or a smaller --rows"
        )
    return rows[: options.rows], rows[options.rows :]


def _load_rows(source: str, options: Options, limit: int) -> "list[Row]":
    from siftune.data.readers import load_rows

    return load_rows(source, options.split, limit, options.format)


def _load(options: Options, rows: "list[Row]", console: Console) -> "tuple[Any, Any, list[dict[str, Tensor]]]":
    """Load the model, to the accelerator if there is one, and make batches of the rows."""
    import torch

    from siftune.models.source import load_model

    with console.status(f"loading {options.model}"):
        model, tokenizer = load_model(options.model, options.dtype)
        if torch.accelerator.is_available():
            model = model.to(torch.accelerator.current_accelerator())
    return model, tokenizer, _batches(options, rows, tokenizer)


def _batches(options: Options, rows: "list[Row]", tokenizer: Any) -> "list[dict[str, Tensor]]":
    from siftune.data.tokenize import Collator, tokenize_rows

    table = tokenize_rows(rows, tokenizer, options.max_length, options.template, options.completion_only).to_list()
    collate, size = Collator(tokenizer.pad_token_id), options.batch_size
    return [collate(table[start : start + size]) for start in range(0, len(table), size)]


def _kit_dtype(options: Options, model: Any) -> "torch.dtype":
    """The kit's dtype: with auto the checkpoint's, but no wider than the model that is compressed."""
    import torch
    from transformers import AutoConfig

    from siftune.models.source import resolve

    if options.kit_dtype != "auto":
        return getattr(torch, options.kit_dtype)  # type: ignore[no-any-return]
    config = AutoConfig.from_pretrained(resolve(options.model), trust_remote_code=False)
    return min(model.dtype, config.dtype or model.dtype, key=lambda dtype: dtype.itemsize)  # type: ignore[no-any-return]


def _settings(options: Options, keep: float) -> "EmulatorSettings":
    from siftune.offsite.emulator.plan import EmulatorSettings

    return EmulatorSettings(
        method=options.method,
        keep=keep,
        lambda_attn=options.lambda_attn,
        lambda_mlp=options.lambda_mlp,
        basis=options.basis,
        mlp=options.mlp,
        split=_split(options),
        allot=options.allot,
    )


def _grid(options: Options) -> "SweepGrid":
    from siftune.offsite.audits.sweep import SweepGrid

    return SweepGrid(
        keeps=options.keeps,
        lambdas=options.lambdas,
        bases=options.bases,
        mlps=options.mlps,
        methods=options.methods,
        lambda_on=options.lambda_on,
        split=_split(options),
        allot=options.allot,
    )


def _split(options: Options) -> Any:
    from siftune.offsite.emulator.split import Split

    return Split(options.first, options.last)


def _flag(name: str) -> str:
    return name.replace("_", "-")
