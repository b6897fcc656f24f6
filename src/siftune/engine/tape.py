"""Records the gradients of single rows, layer by layer, in one ordinary backward pass.

While a layer runs, its trainable parameters are *detached*, so that autograd forms no gradient of its own for them. A
*tap* on the output of the module that uses a parameter forms that of every row instead, when backward gets there, and
adds it to the record of the layer. The gate on the layer's input runs last of all in the layer: there the record is
complete, is reduced to one gradient per parameter, and freed. So what is held at any time is one layer's.

Vectors that scale activations (DoRA's magnitude, IA3, the weight of an RMSNorm) are expanded to one copy per row
instead; the gradient of the copies is the one that is wanted.

A tap saves a module's input as autograd would have done for the weight: by `save_for_backward`, so that activation
checkpointing recomputes it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siftune.engine import per_sample
from siftune.engine.gate import Deliver, Gate, hidden_states, is_active, is_upstream, taped, with_hidden
from siftune.engine.groups import LayerGroup
from siftune.engine.parameter_kinds import Kind, kinds_of
from siftune.engine.substitution import ForwardSubstitution, Slot, untraced
from siftune.errors import UnsupportedError

Gradients = Mapping[nn.Parameter, Tensor]

P = TypeVar("P")  # what stands for a pass

# what a decoder layer is given where one row holds several sequences
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


class LayerRecord:
    """Gradients of single samples for the parameters of one layer, in one pass.

    Args:
        rows: Rows B of the batch.
        positions: Positions T in a row.
        pairs: Rows i and i + B/2 are one sample.
    """

    def __init__(self, rows: int, positions: int, pairs: bool) -> None:
        self._rows = rows
        self._positions = positions
        self._pairs = pairs
        self._grads: dict[nn.Parameter, Tensor] = {}

    def add(self, parameter: nn.Parameter, grads_BD: Tensor) -> None:
        """Add the rows' gradients for a parameter; a module may run more than once."""
        grads_SD = per_sample.over_pairs(grads_BD) if self._pairs else grads_BD
        held = self._grads.get(parameter)
        self._grads[parameter] = grads_SD if held is None else held + grads_SD

    def take(self) -> dict[nn.Parameter, Tensor]:
        """Hand over what was recorded, and hold it no longer."""
        grads, self._grads = self._grads, {}
        return grads

    def by_row(self, values: Tensor) -> Tensor:
        """View a module's input or output as (B, T, …)."""
        if values.ndim == 2:
            return values.view(self._rows, self._positions, -1)
        return values

    def check(self, module: nn.Module, values: Tensor) -> None:
        """Refuse a module that does not see the rows one by one."""
        flat = values.ndim == 2 and values.shape[0] == self._rows * self._positions
        if not flat and (values.ndim < 3 or values.shape[0] != self._rows):
            raise UnsupportedError(
                f"{type(module).__name__} works on a tensor of shape {tuple(values.shape)} in a batch of {self._rows} "
                f"rows and {self._positions} positions, so the rows' gradients cannot be told apart; leave it "
                "without an adapter"
            )

    def copies(self, vector: Tensor, given: Tensor) -> Tensor:
        """Expand a vector to one copy per row, a leaf whose gradient is that of the rows; (B, 1, …, D)."""
        between = (1,) * max(0, given.ndim - 2)
        return vector.detach().reshape(-1).expand(self._rows, *between, -1).requires_grad_()

    def spread(self, copies: Tensor, given: Tensor) -> Tensor:
        """Let copies per row meet values that have rows and positions in one dimension."""
        return copies.repeat_interleave(self._positions, 0) if given.ndim == 2 else copies


class Tap(torch.autograd.Function):
    """Identity on a module's output that reads the output's gradient, and the module's input."""

    @staticmethod
    def forward(ctx: Any, read: Callable[[Tensor, Tensor], None], output: Tensor, given: Tensor) -> Tensor:
        """Pass `output` on; `read(grad_output, given)` is called in backward."""
        ctx.read = read
        ctx.save_for_backward(given.to(output.dtype))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        """Read the gradient and pass it on."""
        ctx.read(grads[0], ctx.saved_tensors[0])
        return None, grads[0], None


class RowVector(Tensor):
    """One copy of a vector per row, (B, 1, D), which keeps the rows where a vector would be flattened.

    PEFT flattens DoRA's magnitude and IA3's scales before it multiplies with them.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Ignore flattening, stay what it is when divided, and become a plain tensor otherwise."""
        if func in (Tensor.view, Tensor.flatten, Tensor.reshape):
            return args[0].as_subclass(Tensor)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        divided = func in (Tensor.div, Tensor.__truediv__, Tensor.true_divide)
        return result.as_subclass(cls) if divided else result


class Tape(Generic[P]):
    """Records in the layers of one model until `remove()`.

    Args:
        groups: The layers of a model and their trainable parameters.
        begin: Called with the number of samples when a forward pass with gradients enters its first layer. Returns
            what stands for the pass, or None: then it is as if there were no tape.
        reduce: Called in backward for each layer, from the last to the first, with what stands for the pass, and with
            the gradients of single samples, (S, …) for each parameter. Returns one gradient per parameter; a
            parameter left out gets none.
        pairs: Row i and row i + B/2 are one sample, as in preference training.

    Raises:
        UnsupportedError: A parameter's gradients cannot be told apart by row.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        begin: Callable[[int], P | None],
        reduce: Callable[[P, LayerGroup, dict[nn.Parameter, Tensor]], Gradients],
        pairs: bool = False,
    ) -> None:
        self._groups = list(groups)
        self._begin = begin
        self._reduce = reduce
        self._pairs = pairs
        self._records: dict[int, LayerRecord] = {}  # of the pass that ran last
        self._delivers: list[Deliver] = []  # of its gates
        self._entered = -1  # the highest layer in it
        self._pass: P | None = None
        self._paused = False
        self._checked = False
        kinds = kinds_of(self._groups)
        self._vectors = {slot.parameter: kind for slot, kind in kinds.items() if kind.is_vector}
        self._substitution = ForwardSubstitution(self._groups, self._stand_in)
        self._handles: list[RemovableHandle] = [
            group.module.register_forward_pre_hook(untraced(partial(self._enter, group)), with_kwargs=True)
            for group in self._groups
        ]
        for owner, uses in _by_owner(kinds).items():
            self._handles.append(owner.register_forward_hook(untraced(partial(self._tap, uses))))
        taped.update(group.module for group in self._groups)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let passes in this block go by unrecorded; their backward must be in the block too."""
        records, self._records = self._records, {}
        self._paused = True
        try:
            yield
        finally:
            self._paused, self._records = False, records

    def remove(self) -> None:
        """Take all hooks off and forget what was recorded; calling it twice does no harm."""
        self._substitution.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._records.clear()
        self._delivers.clear()
        for group in self._groups:
            taped.discard(group.module)

    def _enter(self, group: LayerGroup, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run before a layer: gate its input, and open its record."""
        if not torch.is_grad_enabled() or self._paused:
            return None
        if in_backward():
            return self._enter_again(group, args, kwargs)
        hidden = hidden_states(args, kwargs)
        rows, positions = _rows_and_positions(group, hidden)
        if self._entered < 0 or (group.index <= self._entered and not self._is_in_loop(hidden)):
            self._check(kwargs)
            self._records, self._delivers, self._entered = {}, [], -1
            self._pass = self._begin(self._samples(rows))
        elif group.index in self._records:  # its first gate is the last to run in backward, and the records add up
            return None
        self._entered = max(self._entered, group.index)
        if self._pass is None or not is_active(group):
            return None
        record = self._records[group.index] = LayerRecord(rows, positions, self._pairs)
        parameters = list(group.parameters.values())
        gate: Any = Gate  # `apply` is typed in some versions of torch only
        deliver = partial(self._deliver, self._pass, group, record, parameters)
        self._delivers.append(deliver)
        return with_hidden(args, kwargs, lambda entering: gate.apply(deliver, entering, *parameters))

    def _is_in_loop(self, hidden: Tensor) -> bool:
        """Whether hidden states come from layers of the pass that runs: the model goes through them again."""
        return is_upstream(hidden, lambda node: getattr(node, "deliver", None) in self._delivers)

    def _deliver(
        self, this: P, group: LayerGroup, record: LayerRecord, parameters: Sequence[nn.Parameter]
    ) -> list[Tensor | None]:
        reduced = self._reduce(this, group, record.take())
        return [reduced[p].to(p.dtype) if p in reduced else None for p in parameters]

    def _stand_in(self, slot: Slot, current: Tensor, given: Tensor | None) -> Tensor:
        """Stand in for a parameter while its module runs."""
        record = self._records.get(slot.layer)
        if record is None or not torch.is_grad_enabled() or not current.requires_grad:
            return current
        kind = self._vectors.get(slot.parameter)
        if kind is None:
            return current.detach()
        assert given is not None
        record.check(slot.owner, given)
        copies = record.copies(current, given)
        copies.register_hook(partial(_read_copies, record, slot.parameter))  # type: ignore[no-untyped-call]
        spread = record.spread(copies, given)
        return spread.as_subclass(RowVector) if kind is Kind.FLATTENED else spread

    def _tap(
        self, uses: Sequence[tuple[Slot, Kind]], module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        """Run after a module that uses parameters: tap its output."""
        record = self._records.get(uses[0][0].layer)
        if record is None or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        record.check(module, output)
        tap: Any = Tap
        tapped: Tensor = tap.apply(partial(_read_linear, record, uses), output, args[0])
        return tapped

    def _samples(self, rows: int) -> int:
        if self._pairs and rows % 2:
            raise UnsupportedError(
                f"a batch of {rows} rows cannot be pairs: the first half must hold the chosen rows, the second the "
                "rejected ones; set pairs=False for other batches"
            )
        return rows // 2 if self._pairs else rows

    def _enter_again(self, group: LayerGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run before a layer that activation checkpointing runs again with its hooks: let it record as it did."""
        refuse = partial(_refuse_reentrant, group)
        if self._entered < 0:
            refuse()
        if group.index not in self._records:
            return None
        gate: Any = Gate  # else nothing in the layer might need a gradient; its own is asked for where reentrant only
        parameters = list(group.parameters.values())
        return with_hidden(args, kwargs, lambda entering: gate.apply(refuse, entering, *parameters))

    def _check(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse packed rows, once: their samples share a row."""
        if self._checked:
            return
        self._checked = True
        where = kwargs.get("position_ids")
        starts = 1
        if isinstance(where, Tensor) and where.ndim == 2 and where.shape[1] > 1:  # zeros may be padding, 0 1 is not
            starts = int(((where[:, :-1] == 0) & (where[:, 1:] == 1)).sum(-1).max())
        if starts > 1 or any(kwargs.get(name) is not None for name in _PACKED):
            raise UnsupportedError(
                "rows hold several sequences (packing or padding-free collation), so samples cannot be told apart; "
                "turn packing and padding_free off"
            )


def in_backward() -> bool:
    """Whether autograd is at work in this thread, as when activation checkpointing runs a layer again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _rows_and_positions(group: LayerGroup, hidden: Tensor) -> tuple[int, int]:
    if hidden.ndim < 3:
        raise UnsupportedError(
            f"{group.name} is given hidden states of shape {tuple(hidden.shape)}, where rows cannot be told apart"
        )
    return hidden.shape[-3], hidden.shape[-2]  # before them may stand copies of the hidden states, as in Gemma 3n


def _refuse_reentrant(group: LayerGroup) -> NoReturn:
    raise UnsupportedError(
        f"activation checkpointing with use_reentrant=True runs {group.name} with gradients in backward only, so "
        "samples cannot be selected there; set use_reentrant=False"
    )


def _by_owner(kinds: Mapping[Slot, Kind]) -> dict[nn.Module, list[tuple[Slot, Kind]]]:
    owners: dict[nn.Module, list[tuple[Slot, Kind]]] = {}
    for slot, kind in kinds.items():
        if not kind.is_vector:
            owners.setdefault(slot.owner, []).append((slot, kind))
    return owners


def _read_copies(record: LayerRecord, parameter: nn.Parameter, grads_B1D: Tensor) -> None:
    record.add(parameter, grads_B1D.reshape(-1, *parameter.shape))


def _read_linear(record: LayerRecord, uses: Collection[tuple[Slot, Kind]], grad_output: Tensor, given: Tensor) -> None:
    grad_BTO, input_BTI = record.by_row(grad_output), record.by_row(given)
    for slot, kind in uses:
        record.add(slot.parameter, kind.gradient(slot.owner, grad_BTO, input_BTI))
