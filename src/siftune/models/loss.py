"""The loss over label positions, from logits that are computed only there.

A vocabulary is large and completions are short: a causal LM spends a large share of its time and memory on logits of
prompt and padding positions, which no loss looks at. `label_positions` says where logits are needed. `logits_at` lets
the model's own forward pass run unchanged up to its output embedding, and hands that module only the hidden states
there; what a model does to its logits afterwards (soft-capping, scaling) happens to those positions alone, without this
project having to know of it. `token_loss` is the loss that the model would have returned.

Shapes: B rows, T positions, H hidden size, N label positions, V vocabulary size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import AdapterError, LayerError
from siftune.models.cross_entropy import cross_entropy

IGNORED = -100  # label of a token that is not learned, as torch's cross entropy expects it


def label_positions(labels_BT: Tensor) -> Tensor:
    """Positions whose next token is a label; (B, T) bool, false in the last column."""
    mask_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    mask_BT[:, :-1] = labels_BT[:, 1:] != IGNORED
    return mask_BT


def next_labels(labels_BT: Tensor) -> Tensor:
    """The labels that `label_positions` predict, in row-major order; (N,) int64."""
    shifted = labels_BT[:, 1:]
    return shifted[shifted != IGNORED]


def find_output_embeddings(model: nn.Module) -> nn.Module:
    """Return the module that turns hidden states into logits, as the model calls it: with PEFT's wrapper, if any.

    The model may be PEFT-wrapped, or in a wrapper that keeps it as `.module`.

    Raises:
        LayerError: The model has no output embeddings.
    """
    inner = model if hasattr(model, "get_output_embeddings") else getattr(model, "module", model)
    getter = getattr(inner, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        raise LayerError(
            f"{type(model).__name__} has no output embeddings (found {type(head).__name__}). "
            "Load a model with a language-modelling head, e.g. with AutoModelForCausalLM."
        )
    return head


@contextmanager
def logits_at(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Make the next forward pass compute logits only where `mask` is true.

    Inside the block `model(input_ids=…).logits` has shape (1, N, V) instead of (B, T, V): the positions under
    the mask in row-major order, the order of `labels[mask]`. Gradients flow as usual. Pass no labels to the
    model inside the block: its own loss expects (B, T, V). One forward pass per block.

    Args:
        model: A causal language model, PEFT-wrapped or not.
        mask: (B, T) bool; row b, position t is true where the logits that follow token t are wanted.

    Raises:
        LayerError: The model has no output embeddings, or never called them, or called them more than once.
        AdapterError: The hidden states don't have the mask's (B, T), as when an adapter adds virtual tokens.
        ValueError: The mask isn't a (B, T) tensor of bool.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"mask must be bool with shape (B, T); found {mask.dtype} with shape {tuple(mask.shape)}")
    head = find_output_embeddings(model)
    calls = 0

    def keep_masked(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        return (_select(args, mask), *args[1:])

    handle = head.register_forward_pre_hook(keep_masked)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise LayerError(
            f"the head of {type(model).__name__} ({type(head).__name__}) was called {calls} times in one "
            "block, once is supported. Run one forward pass per block, on a model whose forward calls "
            "get_output_embeddings() as a module, or compute all logits."
        )


@contextmanager
def contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """Hand the head contiguous hidden states inside the block, whatever slice of them the model takes.

    Generation needs the logits of each row's last position: a strided view. With frozen weights in bfloat16 torch 2.13
    multiplies such a view on processors by a loop of its own, hundreds of times slower than by its library.

    Raises:
        LayerError: The model has no output embeddings.
    """

    def pack(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in args)

    handle = find_output_embeddings(model).register_forward_pre_hook(pack)
    try:
        yield
    finally:
        handle.remove()


def _select(args: tuple[Any, ...], mask: Tensor) -> Tensor:
    """Pick the hidden states under the mask: (B, T, H) → (1, N, H)."""
    hidden = args[0] if args else None
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
        found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise AdapterError(
            f"the head got hidden states {found}, expected (B, T, H) with (B, T) = {tuple(mask.shape)}. "
            "Adapters that add virtual tokens (prompt or prefix tuning) are not supported: use LoRA or DoRA."
        )
    where = mask.to(hidden.device).flatten().nonzero().squeeze(1)
    return hidden.reshape(-1, hidden.shape[2]).index_select(0, where).unsqueeze(0)


def token_loss(logits_1NV: Tensor, labels_BT: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross entropy in float32, summed over label positions and divided by their number.

    Args:
        logits_1NV: (1, N, V) logits at `label_positions(labels_BT)`, any floating dtype.
        labels_BT: (B, T) int64, -100 where nothing is learned.
        items: Divisor in place of N: the labels of all micro-batches of an optimizer step.

    Returns:
        Scalar float32; 0 where there is no label at all.
    """
    return mean_loss(token_losses(logits_1NV, labels_BT), items)


def token_losses(logits_1NV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross entropy of each label, in their order; (N,) float32. Arguments are those of `token_loss`."""
    targets_N = next_labels(labels_BT).to(logits_1NV.device)
    return cross_entropy(logits_1NV.squeeze(0), targets_N).float()


def weighed(losses_N: Tensor, labels_BT: Tensor, weights_B: Tensor | None) -> Tensor:
    """Losses of labels, each times its row's weight, (B,); as they are where rows have none.

    The divisor of a mean stays, so that a row's gradient is as many times that of weight 1, whatever else is in the
    batch.
    """
    if weights_B is None:
        return losses_N
    weights_N = weights_B.float().repeat_interleave(label_positions(labels_BT).sum(1))
    return losses_N * weights_N.to(losses_N.device)


def mean_loss(losses_N: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Sum of the labels' losses over their number, or over `items`; a scalar, 0 where there is no label at all."""
    divisor = losses_N.numel() if items is None else items
    if isinstance(divisor, Tensor):
        return losses_N.sum() / divisor.to(losses_N.device).clamp_min(1)
    return losses_N.sum() / max(1, divisor)


def losses_agree(model: nn.Module, ours: float, theirs: float) -> bool:
    """Whether two losses of a model are one, up to the rounding of its dtype."""
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return math.isclose(ours, theirs, rel_tol=1e-2 if half else 1e-4, abs_tol=1e-4)


def difference_from_model(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """This loss and the model's own on one row of a batch; the caller has gradients and dropout off.

    The row with most labels is taken, so that the full logits of one row are all that it costs. The batch has (B, T)
    `input_ids`, `attention_mask` and `labels`.
    """
    row = int((inputs["labels"] != IGNORED).sum(1).argmax())
    rows = inputs["labels"].shape[0]
    one = {k: v[row : row + 1] for k, v in inputs.items() if isinstance(v, Tensor) and v.shape[:1] == (rows,)}
    labels = one["labels"]
    with logits_at(model, label_positions(labels)):
        logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits
    return float(token_loss(logits, labels)), float(model(**one).loss)
