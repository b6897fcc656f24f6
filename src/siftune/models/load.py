"""Loading of models and tokenizers, in a dtype, quantisation and attention that fit the machine."""

import contextlib
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftune.base.environment import ran_out
from siftune.base.errors import ModelError, SiftuneError
from siftune.base.files import why_unreadable
from siftune.models.source import check_source, not_there, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

_OF_BIN = (pickle.UnpicklingError, EOFError)  # of pytorch_model.bin
# No code from the hub. Since 5.25, transformers by default also fetches kernels, and removes them and any other forward
# of the same modules, such as a compiled one, at each switch between training and evaluation.
_NO_CODE: dict[str, Any] = {"trust_remote_code": False, "use_kernels": False}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    source: str, dtype: str = "auto", quantize: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer; code from its repository and the hub's kernels are never run.

    Args:
        source: A folder with `config.json`, a hub id, or `smollm2`, which is downloaded on first use.
        dtype: Dtype of the weights: `float32`, `bfloat16`, `float16`, or `auto`, the checkpoint's, or one that
            this machine multiplies fast; see `usable_dtype`.
        quantize: Quantise the weights to `4bit` or `8bit` with bitsandbytes; see `quantised.quantization`.

    Returns:
        The model in eval mode, on the CPU; and the tokenizer, with a padding token.

    Raises:
        ModelError: The source does not exist, cannot be reached, is no causal language model, or needs code of its
            own. The message says what was tried and what to do.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    check_source(source)
    name = resolve(source)
    with _load_errors(name):
        model = _model(name, dtype, quantize)
        tokenizer = _tokenizer(name, source)
    if quantize == "4bit":
        from siftune.models.quantised import KeptUnpacked

        KeptUnpacked(model)  # permanently
    return model, tokenizer


def load_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer alone, with a padding token.

    Raises:
        ModelError: As `load_model`.
    """
    check_source(source)
    name = resolve(source)
    with _load_errors(name):
        return _tokenizer(name, source)


def _tokenizer(name: str | Path, source: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    set_padding(tokenizer, source)
    return tokenizer


def set_padding(tokenizer: Any, source: str) -> None:
    """Use the end token for padding if there is no padding token: a new one would change the vocabulary.

    Raises:
        ModelError: There is neither.
    """
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {source} has neither a padding nor an end token: set pad_token in its "
            "tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.eos_token


def _load_config(name: str | Path) -> "PretrainedConfig":
    """Load a model's config, without the kernels that it names: transformers would fetch and run them."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    config._attn_implementation = config._experts_implementation = None  # of configs inside it too
    return config


def _model(name: str | Path, dtype: str, quantize: str | None) -> "PreTrainedModel":
    """Load a model with all its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from siftune.models.quantised import quantization

    config = _load_config(name)
    computing = usable_dtype(torch.bfloat16, config.model_type) if quantize else torch.float32
    settings = quantization(quantize, computing)
    with quiet_bars():
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, **_NO_CODE, **settings)
    if dtype == "auto" and quantize:  # quantised weights cannot be converted
        usable = usable_dtype(model.dtype, model.config.model_type)
        return model if usable == model.dtype else _model(name, _name_of(usable), quantize)
    return fit_for_this_machine(model) if dtype == "auto" else model


def fit_for_this_machine(model: "PreTrainedModel") -> "PreTrainedModel":
    """Convert a model to a dtype that this machine multiplies fast; see `usable_dtype`."""
    return in_dtype(model, usable_dtype(model.dtype, model.config.model_type))


def in_dtype(model: "PreTrainedModel", dtype: Any) -> "PreTrainedModel":
    """Convert a model's weights to another dtype, in place.

    Tensors of a third dtype stay, and so do buffers that no checkpoint has, such as rotary frequencies: transformers
    keeps these in float32, and rounding them shifts the angles of distant positions.
    """
    before = model.dtype
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype == before:
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            kept = name not in module._non_persistent_buffers_set
            if buffer is not None and kept and buffer.dtype == before:
                module._buffers[name] = buffer.to(dtype)
    return model


def usable_dtype(dtype: Any, model_type: str = "") -> Any:
    """A dtype in which this machine multiplies fast, if possible the wanted one (ours).

    Accelerators without bfloat16, such as T4 and V100, get float16, with a scaled loss in training. Gemma's activations
    exceed its range and get float32, as do processors without products in half precision.

    Args:
        dtype: The wanted dtype.
        model_type: Type of the model in its config.
    """
    import torch

    if torch.accelerator.is_available():
        if dtype != torch.bfloat16 or _has_bfloat16():
            return dtype
        fitting = torch.float32 if model_type.startswith("gemma") else torch.float16
        logger.info("this accelerator is slow in %s; the model is used in %s", dtype, fitting)
        return fitting
    if _multiplies(dtype):
        return dtype
    logger.info("this processor is slow in %s; the model is used in float32", dtype)
    return torch.float32


def _has_bfloat16() -> bool:
    """Whether the accelerator itself has products in bfloat16; torch emulates them slowly on older ones."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    ask = getattr(torch.get_device_module(), "is_bf16_supported", None)
    return ask is None or bool(ask())


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _multiplies(dtype: Any) -> bool:
    """Whether this processor has fast products in a dtype."""
    import torch

    # torch also reports bfloat16 where AVX-512 has no instructions for it, as on Intel's Ice Lake, and emulates it
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported():
        return False
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    ask = getattr(torch.ops.mkldnn, name, None) if name and built_in else None
    return ask is None or bool(ask())


def use_attention(model: "PreTrainedModel", name: str) -> None:
    """Set a model's attention implementation; its results are the same up to rounding.

    Args:
        model: The loaded model.
        name: `auto`, which changes nothing, or a name of transformers: `eager`, `sdpa`, `flash_attention_2`,
            `flash_attention_3`, `flex_attention`.

    Raises:
        ModelError: The model has no such implementation, or a package for it is missing.
    """
    if name == "auto":
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"attention {name} cannot be used: {' '.join(str(error).split())}") from error
    used = model.config._attn_implementation
    if used != name:
        raise ModelError(f"{type(model).__name__} has {used} attention and no other; leave attention at auto")


@contextlib.contextmanager
def _load_errors(name: str | Path) -> Iterator[None]:
    """Turn loading errors of the block into one sentence; they are of many kinds, as configs check themselves."""
    try:
        yield
    except SiftuneError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise ModelError(_reason(name, error)) from error


def _reason(name: str | Path, error: Exception) -> str:
    if isinstance(error, _OF_BIN):
        return f"cannot load the weights of the model {name}: {why_unreadable(error)}: use another, or safetensors"
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"model {name} needs code of its own repository, which siftune never runs: use another model"
    first = re.split(r"[.!] ", text, maxsplit=1)[0].rstrip(".")
    if isinstance(name, Path):
        return f"cannot load a causal language model from the folder {name}: {first}"
    return not_there(name, first)


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Turn off transformers' progress bars in the block, and restore the setting."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()
