"""Loss over label positions, from logits that are computed only there; the loss of each row.

A vocabulary is large and completions are short. A causal LM spends a large share of its time and memory on logits of
prompt and padding positions, which no loss uses. `label_positions` returns the positions that need logits. `logits_at`
lets the model's own forward pass run unchanged up to its output embeddings, and passes them only the hidden states
there. Later changes of the logits by the model (soft-capping, scaling) then apply to those positions alone.
`token_loss` is the loss that the model would have returned.

`cross_entropy` computes in float32 for a few labels at a time, forward and backward, and writes the gradient in the
logits' dtype. Torch's keeps a float32 copy of the logits, their log-softmax and both gradients, each as large as the
labels of a batch times the vocabulary, at the point of training that needs the most memory.

Shapes: B rows, T positions, H hidden size, N label positions in row-major order, V vocabulary size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any
from weakref import ref

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from siftune.base.errors import AdapterError, LayerError
from siftune.base.numerics import copies_asynchronously

IGNORED = -100  # label of a token without a loss, as in torch's cross entropy
Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]

# logits at a time, of which there are two or three copies in float32: a processor's cache; 0.5 GB on a GPU
_AT_A_TIME = {"cpu": 2**18}
_ELSEWHERE = 2**27


class _OfNewest:
    """A function that keeps its result for the tensor of its last call, with which several users of a batch call it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._newest: tuple[Callable[[], Tensor | None], int, Tensor] = (lambda: None, 0, torch.empty(0))
        update_wrapper(self, function)

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # without a version, so that a change would not be noticed
            return self._function(tensor)
        owner, version, result = self._newest
        if owner() is not tensor or version != tensor._version:
            result = self._function(tensor)
            self.keep(tensor, result)
        return result

    def keep(self, tensor: Tensor, result: Tensor) -> None:
        """Keep a result that is known otherwise."""
        self._newest = ref(tensor), tensor._version, result


@_OfNewest
def label_positions(labels_BT: Tensor) -> Tensor:
    """Return the positions whose next token is a label; (B, T) bool, false in the last column."""
    mask_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    mask_BT[:, :-1] = labels_BT[:, 1:] != IGNORED
    return mask_BT


def next_labels(labels_BT: Tensor) -> Tensor:
    """Return the labels that `label_positions` predict, in row-major order; (N,) int64."""
    return labels_BT.flatten().index_select(0, places(label_positions(labels_BT)) + 1)


@_OfNewest
def places(mask_BT: Tensor) -> Tensor:
    """Return where a mask is true, as numbers of its elements in row-major order; (N,) int64.

    An accelerator makes the host wait for N, but once for a mask.
    """
    return mask_BT.flatten().nonzero().squeeze(1)


def moved(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Move a batch of the CPU to a device, without waiting for it if possible: label positions are found before."""
    asynchronous = copies_asynchronously(device.type)
    there: dict[str, Any] = send_to_device(dict(batch), device, non_blocking=asynchronous)
    own, labels = batch.get("labels"), there.get("labels")
    if isinstance(own, Tensor) and isinstance(labels, Tensor) and own.ndim == 2 and labels is not own:
        positions = label_positions(labels)
        places.keep(positions, places(label_positions(own)).to(device, non_blocking=asynchronous))
        label_positions.keep(labels, positions)  # which was called for the CPU's in between
    return there


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model computes from a batch with labels; a scalar."""
    loss: Tensor = model(**moved(batch, next(model.parameters()).device)).loss
    return loss


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
            f"{type(model).__name__} has no output embeddings (found {type(head).__name__}): "
            "load a model with a language-modelling head, e.g. with AutoModelForCausalLM"
        )
    return head


@contextmanager
def logits_at(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Compute logits only where `mask` is true in the next forward pass.

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
            "block, but once is supported: run one forward pass per block, on a model whose forward calls "
            "get_output_embeddings() as a module, or compute all logits"
        )


@contextmanager
def contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """Pass the head contiguous hidden states inside the block, whatever slice of them the model takes.

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
            f"the head got hidden states {found}, expected (B, T, H) with (B, T) = {tuple(mask.shape)}; "
            "adapters that add virtual tokens (prompt or prefix tuning) are not supported: use LoRA or DoRA"
        )
    where = places(mask).to(hidden.device)
    return hidden.reshape(-1, hidden.shape[2]).index_select(0, where).unsqueeze(0)


def token_loss(logits_1NV: Tensor, labels_BT: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross entropy in float32, summed over label positions and divided by their number.

    Args:
        logits_1NV: (1, N, V) logits at `label_positions(labels_BT)`, any floating dtype.
        labels_BT: (B, T) int64, -100 at tokens without a loss.
        items: Divisor in place of N: the labels of all micro-batches of an optimizer step.

    Returns:
        Scalar float32; 0 without labels.
    """
    return mean_loss(token_losses(logits_1NV, labels_BT), items)


def token_losses(logits_1NV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross entropy of each label, in their order; (N,) float32. Arguments are those of `token_loss`."""
    targets_N = next_labels(labels_BT).to(logits_1NV.device)
    return cross_entropy(logits_1NV.squeeze(0), targets_N).float()


def weighed(losses_N: Tensor, labels_BT: Tensor, weights_B: Tensor | None) -> Tensor:
    """Multiply the losses of labels by their rows' weights, (B,); None: return them unchanged.

    The divisor of a mean does not change. So a row's gradient scales with its weight, whatever else is in the batch.
    """
    if weights_B is None:
        return losses_N
    weights_N = weights_B.float().index_select(0, _rows_of_labels(labels_BT))
    return losses_N * weights_N.to(losses_N.device)


def mean_loss(losses_N: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Sum of the labels' losses over their number, or over `items`; a scalar, 0 without labels."""
    divisor = losses_N.numel() if items is None else items
    if isinstance(divisor, Tensor):
        return losses_N.sum() / divisor.to(losses_N.device).clamp_min(1)
    return losses_N.sum() / max(1, divisor)


def losses_agree(model: nn.Module, ours: float, theirs: float) -> bool:
    """Whether two losses of a model are equal up to the rounding of its dtype."""
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return math.isclose(ours, theirs, rel_tol=1e-2 if half else 1e-4, abs_tol=1e-4)


def difference_from_model(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Return this loss and the model's own on one row of a batch; the caller turns gradients and dropout off.

    It takes the row with the most labels, and costs the full logits of one row. The batch has `input_ids`,
    `attention_mask` and `labels`, (B, T).
    """
    row = int((inputs["labels"] != IGNORED).sum(1).argmax())
    rows = inputs["labels"].shape[0]
    one = {k: v[row : row + 1] for k, v in inputs.items() if isinstance(v, Tensor) and v.shape[:1] == (rows,)}
    labels = one["labels"]
    with logits_at(model, label_positions(labels)):
        logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits
    return float(token_loss(logits, labels)), float(model(**one).loss)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """−log softmax at each label, in float32, or in float64 where the logits are.

    Args:
        logits_NV: (N, V), of any floating dtype.
        targets_N: (N,) int64, from 0 to V − 1.

    Returns:
        (N,), of that dtype; its gradient can be formed once.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.6931])
    """
    apply: Any = _CrossEntropy.apply  # typed in some versions of torch only
    losses: Tensor = apply(logits_NV, targets_N)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        # the largest logits are separate from the sums: one number for both would lose what is small beside them
        wide = _wide(logits_NV)
        largest_N = logits_NV.amax(1).to(wide)
        parts = _parts(logits_NV, largest_N)
        logsums_N = torch.cat(
            [(logits_nV.to(wide) - largest_n[:, None]).exp_().sum(1).log_() for logits_nV, largest_n in parts]
        )
        ctx.save_for_backward(logits_NV, targets_N, largest_N, logsums_N)
        return logsums_N - (logits_NV.gather(1, targets_N[:, None])[:, 0].to(wide) - largest_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, largest_N, logsums_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        parts = _parts(grad_NV, logits_NV, targets_N, largest_N, logsums_N, grad_N)
        for written_nV, logits_nV, targets_n, largest_n, logsums_n, grad_n in parts:
            share_nV = (logits_nV.to(_wide(logits_NV)) - largest_n[:, None]).sub_(logsums_n[:, None]).exp_()
            share_nV.scatter_add_(1, targets_n[:, None], share_nV.new_full((len(targets_n), 1), -1.0))
            written_nV.copy_(share_nV.mul_(grad_n[:, None]))
        return grad_NV, None


def _wide(logits_NV: Tensor) -> torch.dtype:
    return torch.promote_types(logits_NV.dtype, torch.float32)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same labels of all tensors, in chunks; the first is (N, V)."""
    at_a_time = _AT_A_TIME.get(tensors[0].device.type, _ELSEWHERE)
    labels = max(1, at_a_time // max(1, tensors[0].shape[1]))
    return zip(*(torch.split(tensor, labels) for tensor in tensors), strict=True)


def by_row(losses_N: Tensor, labels_BT: Tensor) -> Tensor:
    """Compute the mean loss of each row from the losses of its label tokens.

    Args:
        losses_N: (N,) losses, those of `label_positions(labels_BT)`.
        labels_BT: (B, T) labels.

    Returns:
        (2, B) float32: each row's mean loss, NaN where it has no label; and its label tokens.
    """
    sums_B, counts_B = _sums_by_row(losses_N.detach().float(), labels_BT)
    return torch.stack([sums_B / counts_B, counts_B])


def row_losses(logits_1NV: Tensor, labels_BT: Tensor) -> Tensor:
    """Each row's mean token loss, for gradients of single rows.

    A mean over the tokens of a batch is unsuitable: a row's weight in it depends on the length of the others, so that
    one row changes the gradients of all, and clipping bounds nothing.

    Args:
        logits_1NV: (1, N, V) logits at `label_positions(labels_BT)`, any floating dtype.
        labels_BT: (B, T) int64, -100 at tokens without loss.

    Returns:
        (B,) float32, or float64 if the logits are float64; 0 for rows without labels.
    """
    losses_N = cross_entropy(logits_1NV.squeeze(0), next_labels(labels_BT).to(logits_1NV.device))
    sums_B, counts_B = _sums_by_row(losses_N, labels_BT)
    return sums_B / counts_B.clamp(min=1)


def _sums_by_row(losses_N: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of each row's losses, and number of its label tokens; both (B,), of the losses' dtype."""
    row_N = _rows_of_labels(labels_BT).to(losses_N.device)
    sums_B = losses_N.new_zeros(len(labels_BT)).index_add(0, row_N, losses_N)
    return sums_B, label_positions(labels_BT).sum(1).to(losses_N)


def _rows_of_labels(labels_BT: Tensor) -> Tensor:
    """Row of each label in the batch, in the labels' order; (N,) int64."""
    return places(label_positions(labels_BT)) // labels_BT.shape[1]
