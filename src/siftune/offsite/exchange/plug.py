"""The owner's way back: check what a data owner returned, and put it into the base model.

A return is refused for having moved a tensor too far (`updates`), and, where the owner gives rows to measure on, for a
model that got worse on them.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.errors import KitError, UnsupportedError
from siftune.base.files import new_folder
from siftune.base.numerics import in_float64
from siftune.data.read import load_rows
from siftune.evaluate.measure import PERPLEXITY
from siftune.evaluate.prepare import prepare_rows
from siftune.models.load import in_dtype, load_model, quiet_bars
from siftune.models.save import save_model, save_tokenizer
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange.returned import Tuned, open_return
from siftune.offsite.exchange.settings import MAX_UPDATE, PlugSettings
from siftune.offsite.exchange.updates import LossChange, OwnRows, UpdateReport, compare, rounded_like
from siftune.offsite.kit.config import check_of_base
from siftune.offsite.kit.folder import Kit
from siftune.offsite.kit.manifest import fingerprint
from siftune.offsite.kit.strict import naming

logger = logging.getLogger(__name__)

_SHORT = 12  # hex digits of a hash in messages
_TELL = 0.1  # (ours) share of the update that a rounding error may have without a word


@dataclass(frozen=True)
class PlugResult:
    """A base model with returned layers in it, on disk."""

    folder: Path
    dtype: str  # such as bfloat16
    kit: Kit
    report: UpdateReport
    privacy: Mapping[str, Any] | None  # what the return says of its differential privacy


def plug(
    model_source: str,
    kit: Kit,
    returned: str | Path,
    out: str | Path,
    settings: PlugSettings | None = None,
) -> PlugResult:
    """Put a return into the base model, and save an ordinary model that needs neither kit nor siftune.

    Args:
        model_source: The base model that the kit was made from, for `load_model`.
        kit: The kit that was handed out, from `read_kit`.
        returned: The folder of the return.
        out: Folder of the plugged model; must be new or empty.
        settings: Checks, rows to measure on, and the dtype: auto is the checkpoint's, whatever is computed in.

    Raises:
        InputError: On a return, model, folder or setting that cannot be used; nothing is written then.
    """
    settings = settings or PlugSettings()
    settings.check()
    rows = settings.eval and load_rows(settings.eval, "test", settings.eval_limit, settings.columns)
    with new_folder(out) as partial, open_return(returned, kit) as opened:
        model, tokenizer = load_base(model_source, kit, settings.dtype)
        if settings.dtype == "auto":
            model = in_dtype(model, model.config.dtype or model.dtype)  # back from float32 without a loss
        own = None
        if rows:
            own = OwnRows(
                prepare_rows(rows, copy.deepcopy(tokenizer), (PERPLEXITY,), settings.template), settings.loss_limit
            )
            if torch.accelerator.is_available():
                model = model.to(torch.accelerator.current_accelerator())
        report = _plug_in(model, kit, opened, settings.max_update, own)
        with quiet_bars():
            save_model(model, partial)
        save_tokenizer(tokenizer, partial)
    logger.info("plugged model in %s", out)
    return PlugResult(Path(out), str(model.dtype).removeprefix("torch."), kit, report, opened.privacy)


def plug_in(
    model: PreTrainedModel,
    kit: Kit,
    returned: Mapping[str, Tensor],
    max_update: float = MAX_UPDATE,
    rows: OwnRows | None = None,
) -> UpdateReport:
    """Put returned tensors into the outer layers of a base model, in place and in the model's dtype.

    Args:
        model: The base model, without PEFT around it, its weights in memory.
        kit: The kit that was handed out.
        returned: What the return holds: from `open_return`, which reads a tensor when it is asked for; or the outer
            layers' tensors by neutral name, as of `read_return`.
        max_update: Relative updates of tensors must stay below it; see `updates`.
        rows: Rows on which the model must not get worse, measured before and after.

    Returns:
        How far every tensor and layer moved, and the loss on the rows.

    Raises:
        KitError: The model is not the kit's base, the tensors are not those of the kit's outer layers, an update is not
            below the limit, or the model got worse. The model is as it was then.
        DataError: A row does not fit the model's window.
        RecipeError: A setting is out of range.
        UnsupportedError: Weights of the model are not in memory.

    Example:
        >>> from siftune.evaluate.prepare import prepare_rows
        >>> from siftune.offsite.exchange.updates import OwnRows
        >>> rows = OwnRows(prepare_rows(held_out_rows, tokenizer, ("perplexity",)))
        >>> plug_in(base, kit, returned, rows=rows).rounding  # of `read_return`; here nothing was tuned
        0.0
    """
    _check_in_memory(model)
    check_base(model, kit)
    return _plug_in(model, kit, returned, max_update, rows)


def load_base(source: str, kit: Kit, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base of a kit, and its tokenizer.

    It is checked in the dtype, in which the kit may have been made, or else as the checkpoint has it.

    Args:
        source: For `load_model`, as is `dtype`.
        kit: The kit.
        dtype: The model's.

    Raises:
        KitError: It is another model.
    """
    model, tokenizer = load_model(source, dtype)
    _check_in_memory(model)
    if dtype != "auto" and fingerprint(model) != kit.manifest.fingerprint:
        wanted = model.dtype
        model, tokenizer = load_model(source)
        check_base(model, kit)
        return in_dtype(model, wanted), tokenizer
    check_base(model, kit)
    return model, tokenizer


def _plug_in(
    model: PreTrainedModel, kit: Kit, returned: Mapping[str, Tensor], max_update: float, rows: OwnRows | None
) -> UpdateReport:
    """As `plug_in`, for a model that was checked."""
    before = _outer(model, kit)
    tuned = Tuned(before, returned)
    report = compare(before, tuned, max_update, kit.manifest.model_type)
    report.check()
    values = {name: _value(old.detach(), tuned[name].detach()) for name, old in before.items()}
    if rows is None:
        _fill(before, values)
    else:
        report = replace(report, loss=_fill_if_no_worse(model, before, values, rows))
    if report.rounding > _TELL:
        logger.warning(
            "rounding to %s adds an error of %.0f %% of the update's norm; --dtype float32 avoids it",
            str(model.dtype).removeprefix("torch."),
            100 * report.rounding,
        )
    return report


def _value(before: Tensor, after: Tensor) -> Tensor:
    """A tensor as tuned, in float32 or float64; if the base is wider than the kit, it keeps what the kit rounded."""
    wide = torch.promote_types(before.dtype, torch.float32)
    if torch.promote_types(before.dtype, after.dtype) != after.dtype:
        update = in_float64(after.to(before.device)) - in_float64(rounded_like(before, after))
        return (in_float64(before) + update).to(wide)
    return after.to(wide) if after.dtype == torch.float64 else after


def _fill(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name in places:
            places[name].copy_(values[name].to(places[name].dtype))  # not every device has float64


def _fill_if_no_worse(
    model: PreTrainedModel, places: Mapping[str, Tensor], values: Mapping[str, Tensor], rows: OwnRows
) -> LossChange:
    """Measure before and after. Where it is refused, or measuring fails, the model is as it was."""
    original = {name: tensor.clone() for name, tensor in places.items()}
    before = rows.loss(model)
    try:
        _fill(places, values)
        change = LossChange(before, rows.loss(model), len(rows.prepared.origins), rows.max_loss_increase)
        change.check()
    except BaseException:
        _fill(places, original)
        raise
    return change


def check_base(model: PreTrainedModel, kit: Kit) -> None:
    """Refuse a model that a kit was not made from.

    Raises:
        KitError: It is another one.
    """
    own, of_kit = fingerprint(model), kit.manifest.fingerprint
    if own != of_kit:
        raise KitError(
            f"the kit {kit.path} was made from a model with fingerprint {of_kit[:_SHORT]}…, but this one has "
            f"{own[:_SHORT]}…: give the kit's own base model, with the --dtype that the kit was made with"
        )
    with naming(f"kit {kit.path}"):
        check_of_base(kit.config, kit.manifest, model.config)


def _check_in_memory(model: PreTrainedModel) -> None:
    if any(tensor.device.type == "meta" for tensor in model.state_dict().values()):
        raise UnsupportedError("weights of the model are not in memory: load it on one device, the processor will do")


def _outer(model: PreTrainedModel, kit: Kit) -> dict[str, Tensor]:
    """The tensors of a kit's base that a return is put into, by neutral name."""
    state: dict[str, Tensor] = model.state_dict()
    return {neutral: state[name] for neutral, name in outer_names(model, kit.manifest.split).items()}
