"""Memory and operations of a training step, computed from a model's config without its weights (ours).

A step of siftune's own Trainer runs on torch's device "meta", whose tensors have shapes but no values. Every operation
is seen by a dispatch mode, which adds up the bytes of the storages that are alive, and counts floating-point operations
as `torch.utils.flop_counter` does. Token ids, labels and draws have values, as tensors of the CPU: which positions have
labels decides the shapes. Where the host reads a value of the device, it gets 1, or True.

Attention is torch's flash attention, which stores no matrix of scores, unless another implementation is asked for. The
figures have no share for memory that an allocator holds in reserve, for kernels' own buffers, or for the driver.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from siftune.base.errors import ModelError, SiftuneError, UnsupportedError
from siftune.base.json_files import read_json
from siftune.base.text import one_line
from siftune.bench.cost import Workload
from siftune.bench.worker import random_rows
from siftune.models.load import load_config
from siftune.models.source import resolve
from siftune.recipe.schema import Recipe, method_of, settings_of
from siftune.train.build import build

_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-7b": {**_LLAMA, "vocab_size": 32_000, "intermediate_size": 11_008},
    "llama-8b": {**_LLAMA, "vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8},
}
"""Configs that need no file: LLaMA-7B (arXiv 2302.13971) and Llama 3 8B (arXiv 2407.21783)."""

_MOST_LAYERS = 1024
_DRAWS = 10  # steps to count if each draws layers
META = torch.device("meta")
_READ = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention


@dataclass(frozen=True)
class Need:
    """Memory at the peak of a step, in bytes, and operations of a step.

    Attributes:
        parameters: Weights of the base and the adapter.
        gradients: Gradients of the trainable parameters that are there at the peak.
        states: States of the optimizer.
        activations: All other tensors at the peak: activations, logits, gradients of single rows, temporary values.
        peak: The sum of these.
        flops: Floating-point operations of matrix products and attention in a step.
    """

    parameters: int
    gradients: int
    states: int
    activations: int
    peak: int
    flops: float


def config_of(name: str) -> PretrainedConfig:
    """Config of a model: one of `CONFIGS`, a file config.json, or a source of `load_model`.

    Raises:
        ModelError: There is none, it cannot be read, or no step of it can be computed.
        InputError: It is no JSON object.
    """
    if name in CONFIGS:
        return AutoConfig.for_model("llama", dtype=torch.bfloat16, **CONFIGS[name])
    path = Path(name).expanduser()
    for file in (path, path / "config.json"):
        if file.is_file():
            read_json(file, dict[str, Any], "give another config.json")
    try:
        config = load_config(path if path.is_file() else resolve(name))
    except SiftuneError:
        raise
    except Exception as error:  # of many kinds: a config is code that checks itself
        raise ModelError(f"{name} has no config of a model that can be read: {_said(error)}") from error
    text: Any = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        raise ModelError(f"{name} has a config whose text_config is no object: give another config.json")
    layers, heads = getattr(text, "num_hidden_layers", 1), getattr(text, "num_attention_heads", 1)
    groups = getattr(text, "num_key_value_heads", None) or heads
    for is_wrong, why in (
        (layers > _MOST_LAYERS, f"{layers:,} layers, but at most {_MOST_LAYERS:,} are computed"),
        (getattr(text, "vocab_size", 1) < 1, "an empty vocabulary"),
        (heads % groups, f"{heads} attention heads, which {groups} heads of keys and values do not divide"),
    ):
        if is_wrong:
            raise ModelError(f"{name} has a config with {why}: give another config.json")
    return config


def _said(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def plan(config: PretrainedConfig, work: Workload, method: str, **settings: Any) -> Need:
    """Compute what a step of a method needs.

    Steps are counted until the method has done everything once, such as IST's scoring.

    Args:
        config: Config of the model.
        work: The workload; `model`, `steps` and `warmup` have no effect.
        method: One of siftune's own in `cost.MEASURED`.
        settings: Further fields of the recipe, such as `checkpointing`, or `attention="eager"`, which stores scores.

    Raises:
        ModelError: It is no config of a causal language model.
        UnsupportedError: The step depends on values that a model without weights does not have.

    Example:
        >>> from siftune.bench.cost import Workload
        >>> config = AutoConfig.for_model("llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> need = plan(config, Workload(batch_size=2, length=16), "dense")
        >>> need.peak == need.parameters + need.gradients + need.states + need.activations
        True
    """
    dtype = (config.dtype or torch.bfloat16) if work.dtype == "auto" else getattr(torch, work.dtype)
    # a mask on the device selects everything
    all_true = fx.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    with all_true, TemporaryDirectory() as folder, _Counted() as counted, _Lists(), _flash_attention():
        # fused AdamW is not implemented on this device, and needs the same memory
        recipe = replace(work.recipe(method, folder), **{"attention": "sdpa", "optim": "adamw_torch", **settings})
        period = _period(recipe)
        recipe = replace(recipe, steps=1 + period)
        try:
            with META:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=recipe.attention)
        except Exception as error:  # of many kinds: a model's own code fails on a config that is wrong
            raise ModelError(f"the config is of no causal language model: {_said(error)}") from error
        # a private step draws each of these rows with probability 1
        rows = random_rows(work, config.get_text_config().vocab_size).select(range(work.batch_size))
        try:
            return _counted_steps(recipe, model, rows, Path(folder), counted, period)
        except SiftuneError:
            raise
        except RuntimeError as error:
            raise UnsupportedError(
                f"{method} needs values that a model without weights does not have ({one_line(str(error))[:150]}): "
                "measure it with `siftune bench --methods`"
            ) from error


def _period(recipe: Recipe) -> int:
    """Number of steps in which a method does everything: scores layers, draws some, forms a support gradient."""
    parts = zip(method_of(recipe).parts, settings_of(recipe), strict=True)
    periods = [getattr(s, "support_every", 1) if part.rows else getattr(s, "interval", _DRAWS) for part, s in parts]
    return math.lcm(*map(int, periods))


def _counted_steps(recipe: Recipe, model: nn.Module, rows: Any, folder: Path, counted: "_Counted", period: int) -> Need:
    """Train one step, which creates the optimizer's states, and then those to count."""
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    built = build(recipe, model, tokenizer, {"train": rows}, folder)
    trainer: Any = built.trainer
    trainer.add_callback(_AfterFirstStep(counted))
    vars(trainer.args)["_setup_devices"] = META  # the value of `args.device`
    trainer.log = lambda *_, **__: None  # it reads values
    counted.trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    try:
        trainer.train()
    finally:
        built.release()
    parameters = _bytes(trainer.model.parameters())
    states = _bytes(value for state in trainer.optimizer.state.values() for value in state.values())
    others = counted.peak - parameters - counted.gradients - states
    return Need(parameters, counted.gradients, states, others, counted.peak, counted.operations / period)


class _AfterFirstStep(TrainerCallback):  # type: ignore[misc]
    """Begins to count after the first step."""

    def __init__(self, counted: "_Counted") -> None:
        self._counted = counted

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self._counted.begin()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages on the device, each counted once."""
    storages = {id(storage): storage for storage in (t.untyped_storage() for t in tensors if t.device == META)}
    return sum(storage.nbytes() for storage in storages.values())


class _Counted(TorchDispatchMode):
    """Runs operations on the device "meta", and counts bytes and floating-point operations.

    Attributes:
        trainable: Parameters with gradients.
        peak: Most bytes since `begin`.
        gradients: Bytes of gradients at the peak.
        operations: Floating-point operations since `begin`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trainable: list[nn.Parameter] = []
        self.peak = self.gradients = self.operations = 0
        self._alive: dict[int, weakref.ref[Any]] = {}  # by id of the storage
        self._bytes = 0

    def begin(self) -> None:
        """Count from here."""
        self.peak = self.gradients = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_device = any(tensor.device == META for tensor in tensors)
        if on_device and func is _READ:
            return torch.ones((), dtype=tensors[0].dtype).item()
        if func is _COPY and "device" in kwargs:  # numbers of tokens keep their values
            kwargs = {**kwargs, "device": META if on_device or tensors[0].is_floating_point() else "cpu"}
        elif on_device and any(tensor.device != META for tensor in tensors):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(META), (args, kwargs))
        result = func(*args, **kwargs)
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (tensor.device == META or not tensor.is_floating_point()):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self._bytes += size
        if self._bytes > self.peak:
            self.peak = self._bytes
            self.gradients = _bytes(p.grad for p in self.trainable if p.grad is not None)

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self._bytes -= size


class _Lists(TorchFunctionMode):
    """Has `tolist` return ones for a tensor without values; it calls no operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        if func is Tensor.tolist and args[0].device == META:
            return torch.ones(args[0].shape, dtype=args[0].dtype).tolist()
        return func(*args, **(kwargs or {}))


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Have transformers' attention `sdpa` run torch's flash attention, which it would not on the device "meta"."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _flash
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of transformers; query (B, H, T, D), key and value (B, K, S, D). A mask changes no sizes."""
    output = _FLASH(query, key, value, options.get("dropout", 0.0), True, scale=options.get("scaling"))[0]
    return output.transpose(1, 2).contiguous(), None
