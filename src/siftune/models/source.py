"""Where models come from: a local folder, a hub id, or the packaged small model `smollm2`."""

import contextlib
import importlib.util
import logging
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from siftune.base.errors import ModelError
from siftune.base.files import why_unreadable
from siftune.base.quiet import quiet
from siftune.base.settings import nearest
from siftune.models.hub import similar_folder, why_missing
from siftune.models.smollm2 import NAME as SMOLLM2
from siftune.models.smollm2 import pull_smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

_OF_BIN = (pickle.UnpicklingError, EOFError)  # of pytorch_model.bin
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    source: str, dtype: str = "auto", streamed: bool = False, quantize: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer; code that a repository brings along is never run.

    Args:
        source: A folder with `config.json`, a hub id, or `smollm2`, which is fetched on first use.
        dtype: Number format of the weights: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's, but
            float32 where only a processor is there that cannot multiply in the checkpoint's.
        streamed: Leave the decoder layers' weights in their files until they run; see `streamed.py`.
        quantize: Round the weights to `4bit` or `8bit`, by bitsandbytes; see `quantization`.

    Returns:
        The model in eval mode, on the CPU, or a streamed one where it will run; and the tokenizer, which has a padding
        token.

    Raises:
        ModelError: The source does not exist, cannot be reached, is no causal language model, or needs
            code of its own. The message says what was tried and what to do.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    check_source(source)
    name = resolve(source)
    with _load_faults(name):
        model = _streamed(name, dtype) if streamed else _whole(name, dtype, quantization(quantize))
        tokenizer = _tokenizer(name, source)
    if quantize == "4bit":
        from siftune.models.packing import KeptUnpacked

        KeptUnpacked(model)  # for good
    return model, tokenizer


def load_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer alone, which has a padding token.

    Raises:
        ModelError: As `load_model`.
    """
    check_source(source)
    name = resolve(source)
    with _load_faults(name):
        return _tokenizer(name, source)


def _tokenizer(name: str | Path, source: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    set_padding(tokenizer, source)
    return tokenizer


@contextlib.contextmanager
def _load_faults(name: str | Path) -> Iterator[None]:
    """Say in one sentence why what the block reads could not be loaded."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, *_OF_BIN) as error:
        raise ModelError(_reason(name, error)) from error


def quantization(kind: str | None) -> dict[str, Any]:
    """What transformers is told of bitsandbytes: for 4 bits NF4, the constants rounded too, as QLoRA has it.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if kind is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("quantize needs bitsandbytes, which is not installed: `pip install bitsandbytes`")
    half = torch.bfloat16 if _suits(torch.bfloat16) else torch.float32
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": half}
    config = BitsAndBytesConfig(load_in_4bit=True, **four) if kind == "4bit" else BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config}


def _whole(name: str | Path, dtype: str, quantized: dict[str, Any]) -> "PreTrainedModel":
    """Load a model with all its weights."""
    from transformers import AutoModelForCausalLM

    with quiet_bars():
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **quantized)
    if dtype == "auto" and quantized:  # what is rounded has no other format any more
        return model if _suits(model.dtype) else _whole(name, "float32", quantized)
    return fit_for_this_machine(model) if dtype == "auto" else model


def _streamed(name: str | Path, dtype: str) -> "PreTrainedModel":
    """Load a model without its decoder layers' weights."""
    from transformers import AutoModelForCausalLM

    from siftune.models.streamed import streamed_map

    with quiet_bars(), quiet("accelerate.big_modeling"):  # which tells that weights are on disk
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, use_safetensors=True, device_map=streamed_map(name)
        )
    return _streamed(name, "float32") if dtype == "auto" and not _suits(model.dtype) else model


def fit_for_this_machine(model: "PreTrainedModel") -> "PreTrainedModel":
    """Use float32 on a processor without half-precision products, on which torch is far slower."""
    return model if _suits(model.dtype) else model.float()


def _suits(dtype: Any) -> bool:
    """Whether this machine has fast products in a dtype."""
    import torch

    if torch.accelerator.is_available() or _multiplies(dtype):
        return True
    logger.info("this processor cannot multiply in %s; the model is used in float32", dtype)
    return False


def _multiplies(dtype: Any) -> bool:
    """Whether torch has fast products in a dtype on this processor, as far as it tells."""
    import torch

    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    ask = getattr(torch.ops.mkldnn, name, None) if name and built_in else None
    return ask is None or bool(ask())


def use_attention(model: "PreTrainedModel", name: str) -> None:
    """Have a model use another implementation of attention; its results are the same but for rounding.

    Args:
        model: The model, as loaded; with `auto` it stays as it is.
        name: `auto`, or a name of transformers: `eager`, `sdpa`, `flash_attention_2`, `flash_attention_3`,
            `flex_attention`.

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


def resolve(source: str) -> str | Path:
    """Turn a model source into a folder, or leave a hub id as it is; `smollm2` is fetched if need be.

    Raises:
        ModelError: `source` is a path that does not exist, a file, a folder that holds no model, or a name
            that cannot be a hub id.
    """
    if source == SMOLLM2:
        return pull_smollm2()
    if not source:
        raise ModelError(f"no model given: name a folder, a hub id or {SMOLLM2}")
    path = Path(source).expanduser()
    if path.is_dir():
        return _model_folder(path.absolute())
    if path.is_file():
        raise ModelError(f"{source} is a file: give the folder that holds it and a config.json")
    if source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1 or "\\" in source:
        raise ModelError(f"model folder {path} does not exist (working directory: {Path.cwd()})")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ModelError(f"{source!r} is neither a folder nor a hub id such as owner/name, nor {SMOLLM2}")
    return source


def _model_folder(path: Path) -> Path:
    """Return `path` if it holds a model; the commonest mistakes are the folders of an adapter and of a kit."""
    if (path / "emulator.safetensors").is_file():
        raise ModelError(f"{path} holds a kit, not a whole model: give the model that it was made from")
    if (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} holds an adapter, not a model: give the adapter's base model")
    if (path / "recipe.yaml").is_file():
        raise ModelError(
            f"{path} is a run, not a model: give its base model, with --from-adapter {path} to train its adapter on, "
            f"or the model that `siftune export {path}` writes"
        )
    raise ModelError(f"{path} holds no model: there is no config.json in it")


def _reason(name: str | Path, error: Exception) -> str:
    """Say in one sentence why a model could not be loaded, and what to do."""
    if isinstance(error, _OF_BIN):
        return f"cannot load the weights of the model {name}: {why_unreadable(error)}: use another, or safetensors"
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"model {name} needs code of its own repository, which siftune never runs: use another model"
    first = re.split(r"[.!] ", text, maxsplit=1)[0].rstrip(".")
    if isinstance(name, Path):
        return f"cannot load a causal language model from the folder {name}: {first}"
    return _not_there(name, first)


def _not_there(name: str, why: str) -> str:
    """Say in one sentence that neither a folder nor the hub nor its cache has a model, and what to do."""
    close = similar_folder(name, lambda path: (path / "config.json").is_file()) or nearest(name.lower(), [SMOLLM2])
    guess = f"did you mean {close}? If not, " if close else ""
    cache = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return (
        f"cannot load the model {name!r}: no such folder (working directory: {Path.cwd()}), and neither the hub nor "
        f"its cache in {cache} gave a causal language model ({why}); {guess}give a folder, point HF_HOME at a filled "
        f"cache, or use {SMOLLM2}, which needs no hub (`siftune pull {SMOLLM2}`)"
    )


def check_source(source: str) -> None:
    """Refuse what is no model, shortly and before anything is fetched or loaded.

    Raises:
        ModelError: As `load_model`, but that what a folder holds is not looked at.
    """
    if source == SMOLLM2:
        return
    name = resolve(source)
    if isinstance(name, str) and (why := why_missing(name)):
        raise ModelError(_not_there(name, why))


def set_padding(tokenizer: Any, source: str) -> None:
    """Pad with the end token where there is no padding token: a new one would change the vocabulary."""
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {source} has neither a padding nor an end token: set pad_token in its "
            "tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.eos_token


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal; the setting is put back as it was."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()
