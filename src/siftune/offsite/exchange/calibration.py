"""Calibration: the model that is compressed, and the rows or own texts that it runs on.

Nothing here imports torch before it is needed, so that a command can show its options quickly.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG, AtLeastTwo, Columns, Count, CountOrZero, Seed, Template, Validated
from siftune.methods.options import OWN

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from siftune.base.files import Progress
    from siftune.data.rows import Row
    from siftune.offsite.kit.manifest import Calibration

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(kw_only=True, config=CONFIG)
class CalibrationOptions(Validated):
    """Options of all commands that make emulators: the model, the calibration rows, and the outer layers."""

    calibration: str = OWN
    """own, for texts that the model samples itself after --calibration-prompts; or calibration rows: a .jsonl, .json,
    .csv or .parquet file, or a hub id."""
    calibration_prompts: str | None = None
    """Public rows like those of the tuning, whose prompts begin own texts: a file or hub id, as for --calibration."""
    seed: Seed = 0
    """Seed of own texts."""
    out: Path
    """Folder to write to; must be new or empty."""
    model: str = "smollm2"
    """Model to compress: a folder, a hub id, or smollm2."""
    first: CountOrZero = 2
    """Layers next to the embeddings that are to be tuned."""
    last: CountOrZero = 2
    """Layers before the head that are to be tuned."""
    allot: Literal["measured", "uniform"] = "measured"
    """gradot: measured distributes what is kept by what each matrix would lose, measured on half of the tokens; uniform
    keeps the same share of each."""
    rows: Count | None = None
    """Number of own texts, or of rows to use, from the first. If not given, 1,024 own texts or 32 rows."""
    max_length: AtLeastTwo | None = None
    """Longest row or own text in tokens; what is over is cut off. If not given, 128; for own texts without a chat
    template, the length that three quarters of the rows with the prompts have at most, up to 128."""
    batch_size: Count = 4
    """Rows in a forward and backward pass."""
    completion_only: bool = False
    """Look at the completions alone, not at the prompts."""
    columns: Columns = ()
    """Other names of columns, such as prompt=question completion=answer, as for siftune train."""
    template: Template = "auto"
    """Chat template: auto uses the tokenizer's if it has one, chat requires it, none leaves text as it is."""
    dtype: Dtype = "auto"
    """Data type to compute in; auto: the checkpoint's, or float32 on a processor that lacks it."""

    def check(self) -> None:
        """Check the ranges, and that the folder can be used.

        Raises:
            RecipeError: With one sentence on the first value that cannot be used.
            ModelError: The folder is in use.
        """
        from siftune.base.files import refuse_full

        refuse_full(self.out)
        if self.calibration != OWN and (self.calibration_prompts is not None or self.seed):
            name = "--seed" if self.calibration_prompts is None else "--calibration-prompts"
            raise RecipeError(f"{name} is for own texts, but --calibration names rows: leave one of them out")
        if self.calibration == OWN and self.calibration_prompts is None:
            raise RecipeError(
                "calibration texts that the model samples itself need prompts: give public rows like those of the "
                "tuning with --calibration-prompts FILE, or rows to calibrate on with --calibration FILE"
            )

    @property
    def count(self) -> int:
        """Number of rows or own texts."""
        return self.rows or (1024 if self.calibration == OWN else 32)

    @property
    def longest_row(self) -> int:
        """Longest row in tokens."""
        return self.max_length or 128


def calibration_rows(options: CalibrationOptions) -> "list[Row]":
    """Read the rows, or those whose prompts own texts begin with.

    Raises:
        DataError: They cannot be read.
    """
    if options.calibration_prompts is None:
        return _read(options.calibration, options, options.count)
    from siftune.offsite.exchange.own_texts import samples_of

    return _read(options.calibration_prompts, options, samples_of(options.count))


def calibration_facts(options: CalibrationOptions, batches: "Sequence[dict[str, Tensor]]") -> "Calibration":
    """What a manifest says of the calibration."""
    from siftune.offsite.exchange.emulate import calibrated_on

    return calibrated_on(batches, options.seed if options.calibration == OWN else None)


def load_base(options: CalibrationOptions) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the model, to the accelerator if there is one, and its tokenizer.

    Raises:
        ModelError: It cannot be loaded.
    """
    import torch

    from siftune.models.load import load_model

    model, tokenizer = load_model(options.model, options.dtype)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model, tokenizer


def calibration_batches(
    rows: "Sequence[Row]",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    options: CalibrationOptions,
    progress: "Progress | None" = None,
) -> "list[dict[str, Tensor]]":
    """Turn rows of `calibration_rows` into batches as `batches_of`; own texts are sampled, or read from the cache.

    Raises:
        DataError: A row cannot be used; the message names it.
    """
    if options.calibration != OWN:
        return batches_of(rows, model, tokenizer, options)
    from siftune.models.modules import check_window
    from siftune.offsite.exchange.own_texts import own_texts, prompt_ids, usual_length

    length = options.max_length or usual_length(rows, tokenizer, options.longest_row, options.template)
    check_window(model, length, "an own text")
    prompts = prompt_ids(rows, tokenizer, length, options.template)
    texts = own_texts(model, options.count, length, options.seed, prompts, progress)
    if not options.completion_only:
        texts = [{**text, "labels": text["input_ids"]} for text in texts]
    return in_batches(texts, options.batch_size, tokenizer.pad_token_id)


def batches_of(
    rows: "Sequence[Row]",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    options: CalibrationOptions,
) -> "list[dict[str, Tensor]]":
    """Turn rows into token ids: batches of (B, T) `input_ids`, `attention_mask` and `labels`, in the order of the rows.

    Raises:
        DataError: A row cannot be used; the message names it.
    """
    from siftune.data.tokens import tokenize_rows
    from siftune.models.modules import check_window

    table = tokenize_rows(rows, tokenizer, options.longest_row, options.template, options.completion_only)
    check_window(model, max(table["length"]), "a row")
    return in_batches(table, options.batch_size, tokenizer.pad_token_id)


def in_batches(table: Iterable[Any], batch_size: int, pad_token_id: int) -> "list[dict[str, Tensor]]":
    """Pad tokenised rows and put them into batches, in their order."""
    from siftune.data.batches import Collator

    collate, rows = Collator(pad_token_id), iter(table)
    return [collate(part) for part in iter(lambda: list(islice(rows, batch_size)), [])]


def _read(source: str, options: CalibrationOptions, limit: int) -> "list[Row]":
    from siftune.data.read import load_rows

    return load_rows(source, limit=limit, columns=options.columns)
