"""Gradients of single rows, recorded layer by layer in one ordinary backward pass.

While a layer runs, its trainable parameters are *detached*, so that autograd forms no gradient for them. Instead, a
*tap* on the output of the module that uses a parameter forms the gradient of every row during backward, and adds it to
the record of the layer. The gate on the layer's input runs last in the layer. There the record is complete; it is
reduced to one gradient per parameter, and freed. Only one layer's gradients are held at a time.

Vectors that scale activations (DoRA's magnitude, IA3, the weight of an RMSNorm) are expanded to one copy per row; the
gradient of the copies is the gradient of the rows.

A tap saves a module's input as autograd would for the weight: by `save_for_backward`, so that activation checkpointing
recomputes it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siftune.base.errors import UnsupportedError
from siftune.engine.gate import Alive, Deliver, Gate, always, in_backward, is_active, is_upstream, refuse_second, taped
from siftune.engine.groups import LayerGroup
from siftune.engine.kinds import Kind
from siftune.engine.record import LayerRecord, RowVector, Tap
from siftune.engine.substitution import ForwardSubstitution, Slot, untraced
from siftune.engine.survey import Survey
from siftune.models.layers import hidden_states, with_hidden

Gradients = Mapping[nn.Parameter, Tensor]

P = TypeVar("P")  # representation of a pass
SampleGradients = dict[nn.Parameter, Tensor]  # (S, …) for each parameter

# arguments of a decoder layer for rows with several sequences
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


class Delivery(Generic[P]):
    """Reduces the records of a gate's layers to gradients, called by the gate in backward.

    Args:
        this: Representation of the pass.
        groups: The layers that the gate delivers for.
        records: Records of the pass by layer; layers that run later add theirs.
        reduce: As of `Tape`.
    """

    def __init__(
        self,
        this: P,
        groups: Sequence[LayerGroup],
        records: Mapping[int, LayerRecord],
        reduce: Callable[[P, Sequence[tuple[LayerGroup, SampleGradients]]], Gradients],
    ) -> None:
        self.parameters = [p for group in groups for p in group.parameters.values()]
        self._this = this
        self._groups = groups
        self._records = records
        self._reduce = reduce

    def __call__(self) -> list[Tensor | None]:
        """One gradient for each of `parameters`; None for those that got none."""
        layers = [(group, self._records[group.index].take()) for group in self._groups if group.index in self._records]
        reduced = self._reduce(self._this, layers)
        return [reduced[p].to(p.dtype) if p in reduced else None for p in self.parameters]


class Tape(Generic[P]):
    """Records in the layers of one model until `remove()`.

    Args:
        survey: Survey of the layers.
        begin: Called with the number of samples when a forward pass with gradients enters its first layer. Returns a
            representation of the pass, or None to record nothing.
        reduce: Called in backward for each layer, from the last to the first, with the representation of the pass, the
            layer, and the gradients of single samples, (S, …) for each of its parameters. Returns one gradient per
            parameter; a missing parameter gets none.
        pairs: Row i and row i + B/2 are one sample, as in preference training.
        at_once: Call `reduce` once, with all layers, after backward has passed the first of them. The gradients of all
            layers are then held at the same time.
        alive: Asked when a pass begins; the hooks remove themselves if it returns False.

    Raises:
        RecipeError: The layers have a tape already.
    """

    def __init__(
        self,
        survey: Survey,
        begin: Callable[[int], P | None],
        reduce: Callable[[P, Sequence[tuple[LayerGroup, SampleGradients]]], Gradients],
        pairs: bool = False,
        at_once: bool = False,
        alive: Alive = always,
    ) -> None:
        self._groups = survey.groups
        self.alive = alive
        refuse_second(self._groups, taped, "another method selects samples in these layers already: use one of them")
        self._begin = begin
        self._reduce = reduce
        self._pairs = pairs
        self._at_once = at_once
        self._records: dict[int, LayerRecord] = {}  # of the pass that ran last
        self._delivers: list[Deliver] = []  # of its gates
        self._entered = -1  # the highest layer in it
        self._pass: P | None = None
        self._paused = False
        self._checked = False
        self._vectors = survey.vectors
        self._substitution = ForwardSubstitution(self._groups, self._substitute)
        self._handles: list[RemovableHandle] = [
            group.module.register_forward_pre_hook(untraced(partial(self._enter, group)), with_kwargs=True)
            for group in self._groups
        ]
        for owner, uses in survey.tapped.items():
            self._handles.append(owner.register_forward_hook(untraced(partial(self._tap, uses))))
        taped.update({group.module: self for group in self._groups})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing in this block; the backward of its passes must be in the block too."""
        records, self._records = self._records, {}
        self._paused = True
        try:
            yield
        finally:
            self._paused, self._records = False, records

    def remove(self) -> None:
        """Remove all hooks and drop the records; a second call has no effect."""
        self._substitution.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._records = {}
        self._delivers.clear()
        for group in self._groups:
            if taped.get(group.module) is self:
                del taped[group.module]

    def _enter(self, group: LayerGroup, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run before a layer: gate its input, and open its record.

        A hook sees one layer at a time and does not know where a pass begins. A pass begins at a layer that is not
        above all layers entered before, unless its input comes from layers of the same pass: a model may loop over its
        layers.
        """
        if not torch.is_grad_enabled() or self._paused:
            return None
        if in_backward():
            return self._enter_again(group, args, kwargs)
        hidden = hidden_states(args, kwargs)
        rows, positions = _rows_and_positions(group, hidden)
        if self._entered < 0 or (group.index <= self._entered and not self._is_in_loop(hidden)):
            if not self.alive():
                self.remove()
                return None
            self._check(kwargs)
            self._records, self._delivers, self._entered = {}, [], -1
            self._pass = self._begin(self._samples(rows))
        elif group.index in self._records:  # its first gate runs last in backward, and the records add up
            return None
        self._entered = max(self._entered, group.index)
        if self._pass is None or not is_active(group):
            return None
        first = not self._records
        self._records[group.index] = LayerRecord(rows, positions, self._pairs, [*group.parameters.values()])
        if self._at_once and not first:  # the gate of the first layer delivers for all
            return None
        deliver = self._delivery(self._pass, self._active_groups() if self._at_once else [group])
        gate: Any = Gate  # `apply` is typed in some versions of torch only
        return with_hidden(args, kwargs, lambda entering: gate.apply(deliver, entering, *deliver.parameters))

    def _active_groups(self) -> list[LayerGroup]:
        return [group for group in self._groups if is_active(group)]

    def _is_in_loop(self, hidden: Tensor) -> bool:
        """Whether hidden states come from layers of the current pass, over which the model loops."""
        return is_upstream(hidden, lambda node: getattr(node, "deliver", None) in self._delivers)

    def _delivery(self, this: P, groups: Sequence[LayerGroup]) -> "Delivery[P]":
        """Make the gate's callback, which reduces the records of this pass in backward."""
        delivery = Delivery(this, groups, self._records, self._reduce)
        self._delivers.append(delivery)
        return delivery

    def _substitute(self, slot: Slot, current: Tensor, inputs: Tensor | None) -> Tensor:
        """Substitute a parameter while its module runs.

        A matrix is detached: autograd forms no gradient for it, the tap on its module's output does. A vector is
        replaced by one copy per row, a leaf of its own: autograd forms no sum over rows, and the copies' gradient is
        that of the rows. `current` may be detached already by IST's gates, which come first: then the layer does not
        train, and nothing is recorded.
        """
        record = self._records.get(slot.layer)
        if record is None or not torch.is_grad_enabled() or not current.requires_grad:
            return current
        kind = self._vectors.get(slot.parameter)
        if kind is None:
            return current.detach()
        if "_kernel_repo" in vars(slot.owner):
            raise UnsupportedError(
                f"the {slot.name} of a {type(slot.owner).__name__} is used by a kernel of the hub, which cannot "
                "separate rows: load the model with from_pretrained(..., use_kernels=False)"
            )
        assert inputs is not None
        record.check(slot.owner, inputs)
        copies = record.copies(current, inputs)
        copies.register_hook(partial(_read_copies, record, slot.parameter))  # type: ignore[no-untyped-call]
        spread = record.spread(copies, inputs)
        return spread.as_subclass(RowVector) if kind is Kind.FLATTENED else spread

    def _tap(
        self, uses: Sequence[tuple[Slot, Kind]], module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        """Run after a module that uses parameters: tap its output."""
        record = self._records.get(uses[0][0].layer)
        if record is None or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        read = partial(_read_linear, record, uses)
        if in_backward():  # the record may be that of another pass
            read = partial(_read_again, record, read)
        else:
            record.check(module, output)
        tap: Any = Tap
        tapped: Tensor = tap.apply(read, output, args[0])
        return tapped

    def _samples(self, rows: int) -> int:
        if self._pairs and rows % 2:
            raise UnsupportedError(
                f"a batch of {rows} rows cannot be pairs, whose first half holds the chosen rows and second half the "
                "rejected ones: set pairs=False for other batches"
            )
        return rows // 2 if self._pairs else rows

    def _enter_again(self, group: LayerGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run before a layer that activation checkpointing runs again with its hooks: record as before."""
        refuse = partial(_refuse_reentrant, group)
        if self._entered < 0:
            refuse()
        if group.index not in self._records:
            return None
        # without a gate nothing in the layer might require a gradient. Only reentrant checkpointing uses this gate's
        # gradient: the other form takes only the taps' saved tensors from the second run
        gate: Any = Gate
        parameters = list(group.parameters.values())
        return with_hidden(args, kwargs, lambda entering: gate.apply(refuse, entering, *parameters))

    def _check(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse packed rows, whose samples share a row; checked once."""
        if self._checked:
            return
        self._checked = True
        where = kwargs.get("position_ids")
        starts = 1
        if isinstance(where, Tensor) and where.ndim == 2 and where.shape[1] > 1:  # zeros may be padding, 0 1 is not
            starts = int(((where[:, :-1] == 0) & (where[:, 1:] == 1)).sum(-1).max())
        if starts > 1 or any(kwargs.get(name) is not None for name in _PACKED):
            raise UnsupportedError(
                "rows hold several sequences (packing or padding-free collation), so samples cannot be separated: turn "
                "packing and padding_free off"
            )


@contextmanager
def unrecorded(model: nn.Module) -> Iterator[None]:
    """Pause all tapes in a model for passes that are no training batches, with their backward."""
    with ExitStack() as stack:
        for tape in {taped[module] for module in model.modules() if module in taped}:
            stack.enter_context(tape.paused())
        yield


def _rows_and_positions(group: LayerGroup, hidden: Tensor) -> tuple[int, int]:
    if hidden.ndim < 3:
        raise UnsupportedError(
            f"{group.name} receives hidden states of shape {tuple(hidden.shape)}, in which rows cannot be separated"
        )
    return hidden.shape[-3], hidden.shape[-2]  # copies of the hidden states may precede them, as in Gemma 3n


def _refuse_reentrant(group: LayerGroup) -> NoReturn:
    raise UnsupportedError(
        f"activation checkpointing with use_reentrant=True runs {group.name} with gradients in backward only, so "
        "samples cannot be selected there: set use_reentrant=False"
    )


def _read_again(record: LayerRecord, read: Callable[[Tensor, Tensor], None], *values: Tensor) -> None:
    """Read in a run by reentrant checkpointing, unless backward has left the pass of the record."""
    if record.taken:
        raise UnsupportedError(
            "activation checkpointing with use_reentrant=True and two forward passes before one backward pass mixes "
            "the samples of both: set use_reentrant=False"
        )
    read(*values)


def _read_copies(record: LayerRecord, parameter: nn.Parameter, grads_B1D: Tensor) -> None:
    record.add(parameter, grads_B1D.reshape(-1, *parameter.shape))


def _read_linear(record: LayerRecord, uses: Collection[tuple[Slot, Kind]], grad_output: Tensor, inputs: Tensor) -> None:
    grad_BTO, input_BTI = record.by_row(grad_output), record.by_row(inputs)
    for slot, kind in uses:
        place = None if kind in (Kind.BIAS, Kind.NORM) else record.place(slot.parameter, grad_BTO)
        record.add(slot.parameter, kind.gradient(slot.owner, grad_BTO, input_BTI, place))
