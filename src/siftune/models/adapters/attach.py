"""Attaching adapters to a model, loading saved ones, and refusing models that have some."""

import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn

from siftune.base.errors import AdapterError
from siftune.base.files import why_unreadable
from siftune.base.text import one_line
from siftune.models.adapters.bottleneck import register
from siftune.models.adapters.registry import ADAPTER_TYPES, Shape, filled_in
from siftune.models.adapters.saved import read_config
from siftune.models.modules import inner_model
from siftune.models.quantised import refuse_on_quantised


def attach_adapter(
    model: nn.Module,
    kind: str = "lora",
    rank: int | None = None,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> PeftModel:
    """Attach an adapter to a causal language model, in place.

    Adapter weights are float32 whatever the dtype of the base; see `use_base_dtype` to compute in the base's.

    Args:
        model: A transformers model without adapters.
        kind: Adapter type, a key of `registry.ADAPTER_TYPES`, such as "lora", "dora", "series" or "parallel".
        rank: Rank of the matrices A (rank, in) and B (out, rank), or width of a bottleneck. None: the type's default,
            32 for LoRA, 256 for bottlenecks.
        alpha: Numerator of the response's scale, alpha/rank (alpha/√rank for rsLoRA). None: 2·rank, a scale of 2 (LoRA
            and DoRA); 16 for any rank (rsLoRA, whose scale falls only with √rank); rank (series); 4·rank (parallel).
        dropout: Probability of zeroing an input of A, in [0, 1).
        targets: Names, or ends of dotted names, of the modules to adapt; of bottlenecks "attention" and "mlp". None:
            `targets.layer_linears`, the linear modules of the decoder layers without experts and routers of a mixture.
        layers: Numbers of the decoder layers that get adapters, from 0, negative ones from the end. None: all.

    Raises:
        AdapterError: A setting is out of range or not for this type, the model has adapters already, or a target names
            no module.
        LayerError: There is no such layer; or the decoder layers cannot be found, and `targets` is None or `layers`
            is not.

    Example:
        >>> tuned = attach_adapter(base, rank=8, targets=["q_proj", "v_proj"])
        >>> sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        3584
    """
    shape = filled_in(kind, Shape(rank, alpha, dropout, targets, layers))
    if (shape.rank is not None and shape.rank < 1) or not 0 <= dropout < 1:
        raise AdapterError(f"rank must be ≥ 1 and dropout in [0, 1); found rank={shape.rank}, dropout={dropout}")
    refuse_adapters(model)
    refuse_on_quantised(model, kind)
    config = ADAPTER_TYPES[kind].make(model, shape)
    try:
        tuned = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(
            f"PEFT cannot put an adapter {kind} on {type(model).__name__}: {reason.rstrip('.')}; give other targets or "
            "another rank, or take another adapter type, such as lora"
        ) from error
    refuse_half(tuned)
    return tuned


def refuse_half(model: nn.Module) -> None:
    """Refuse parameters that would train in half precision, as norms of such a model.

    Raises:
        AdapterError: The message names one.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise AdapterError(
                f"{name} would train in {parameter.dtype}, in which small updates are lost: load the model in float32 "
                "(siftune train --dtype float32)"
            )


_UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError, UserWarning,
    re.error,  # of a pattern in the config
    EOFError, pickle.UnpicklingError,  # of a damaged adapter_model.bin
)  # fmt: skip


def load_adapter(model: nn.Module, adapter: Path, base: str, exact: bool = False, trainable: bool = False) -> PeftModel:
    """Load a saved adapter onto its base model, in place.

    Args:
        model: The base model, without adapters.
        adapter: Folder of the adapter, in PEFT's format.
        base: Name of the model in messages.
        exact: Load the adapter in float32 whatever the base's dtype; slower on many machines.
        trainable: Load it for training rather than inference.

    Raises:
        AdapterError: It cannot be read or does not fit the model.
    """
    register()
    read_config(adapter)
    if not any((adapter / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise AdapterError(f"{adapter} has no weights (adapter_model.safetensors); save the adapter again")
    try:
        with warnings.catch_warnings():
            # if weights are missing, PEFT only warns and uses random ones or zeros
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
            # in the base's dtype, as in training: float32 products are slow on many machines
            tuned = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=exact, is_trainable=trainable)
            _refuse_foreign(tuned, adapter, trainable)
            return tuned
    except _UNREADABLE as error:
        raise AdapterError(
            f"the adapter in {adapter} does not fit the model {base}: {why_unreadable(error)}; give the adapter's own "
            "base model"
        ) from error


def _refuse_foreign(tuned: PeftModel, adapter: Path, trainable: bool) -> None:
    """Refuse a file with tensors that are not the adapter's: PEFT ignores these, or puts them into the base model.

    Embeddings, which PEFT can save beside an adapter, are refused for training alone, which would not save them.

    Raises:
        AdapterError: The file has such a tensor, or one of whole numbers.
    """
    own = get_peft_model_state_dict(tuned, save_embedding_layers=not trainable)
    weights = load_peft_weights(str(adapter), device="cpu")
    foreign = sorted(weights.keys() - own.keys())
    if foreign:
        raise AdapterError(
            f"the weights in {adapter} hold {one_line(foreign[0])}, which is no part of the adapter that its "
            "adapter_config.json describes: save the adapter again, with PEFT's save_embedding_layers=False"
        )
    whole = next((name for name, tensor in weights.items() if not tensor.is_floating_point()), None)
    if whole is not None:
        raise AdapterError(
            f"the weights in {adapter} hold {one_line(whole)} as {weights[whole].dtype}, not as floating-point "
            "numbers: save the adapter again"
        )


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model that has PEFT adapters.

    Raises:
        AdapterError: It has.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            f"{type(model).__name__} has adapters already; merge them or take them off "
            "(PEFT: merge_and_unload(), unload()), or continue with them"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether the model, or the base of its adapter, has quantized weights: merging would round them again."""
    return bool(getattr(inner_model(model), "is_quantized", False))


def adapts_shared_ends(model: nn.Module) -> bool:
    """Whether an adapter is on embeddings or head, which share a matrix: no merged matrix does the same for both."""
    base = inner_model(model)
    ends = [part for part in (base.get_input_embeddings(), base.get_output_embeddings()) if part is not None]
    plain = [part.get_base_layer() if isinstance(part, BaseTunerLayer) else part for part in ends]
    return plain != ends and len({id(getattr(part, "weight", part)) for part in plain}) < len(plain)
