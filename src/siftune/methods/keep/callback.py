"""Keep the base model's predictions: a KL penalty on some texts, in any transformers Trainer.

    loss of a step + weight · mean over label tokens of KL(base ‖ model), by a pass over two texts in every second step

The source is arXiv 2605.26097: a KL penalty to the base on texts that the base wrote itself preserves most of what
fine-tuning would forget. Ours: half of the texts continue prompts of training rows, few texts per step, the base's most
likely tokens instead of its complete distribution, and its adapters' suppression instead of a second model.

At the base, the divergence and its gradient are zero on every text. On the base's own samples its Hessian is the Fisher
information, so that the penalty is second order in the update: ½ δᵀ F δ.

The gradient of the penalty is formed when an optimizer step begins, by a pass of its own, and is added to that of the
training batches. So accumulation, the reduction over ranks, clipping and gradient scaling see one gradient. The texts
form fixed groups, whose order follows from the seed; the base's predictions on a group are computed on its first
visit. Therefore nothing but the texts is saved in a checkpoint.
"""

import base64
import itertools
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from siftune.base.errors import DataError, RecipeError, UnsupportedError
from siftune.base.ranks import from_first, rank, world_size
from siftune.data.batches import Collator
from siftune.data.sampled_texts import TokenRow, sample_texts
from siftune.engine.groups import LayerGroup, group_by_layer, outside
from siftune.engine.sharding import is_sharded
from siftune.engine.suppression import adapted_modules, refuse_taken_apart, suppress
from siftune.engine.tape import unrecorded
from siftune.methods.drivers.batches import collated
from siftune.methods.host import deepspeed
from siftune.methods.host.callback import LogLines, calling_trainer, loss_scale, optimizer_to_training, saved_state
from siftune.methods.host.spread import refuse_wrappers
from siftune.methods.keep.maths import Reference, divergence, reference
from siftune.methods.options import KEEP_WEIGHT, OWN
from siftune.models.adapters.full import original_weights
from siftune.models.loss import IGNORED, label_positions, logits_at
from siftune.models.modules import evaluated, inner_model, model_device

TOP = 64
"""Most likely tokens of the base at each position; the others are one class (ours)."""


@dataclass(eq=False)
class Keep(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Penalise KL(base ‖ model) on some texts in every step, against forgetting (arXiv 2605.26097).

    The base is the same model with its adapters suppressed. It adds to the Trainer's log `keep/kl`, the mean divergence
    in nats per token. It composes with all methods; list it anywhere among the callbacks.

    Args:
        rows: Texts, in the form in which the Trainer's training rows reach its collator; the divergence is measured at
            their labels. "own": texts that the base writes when training begins, half of them after prompts of random
            training rows. A prompt is what precedes a row's `labels`, or the ones of TRL's `completion_mask` or
            `assistant_masks`; rows without prompts, and rows of a stream, have none.
        weight: Factor of the penalty.
        size: Texts per pass and rank.
        every: Optimizer steps between two passes; the penalty then counts as often.
        texts: Number of own texts.
        length: Tokens of an own text, with its prompt, at most; at least 8 tokens follow a prompt.
        seed: Seed of the own texts and of the order.
        layers: Path of the decoder layers, if their structure does not identify them.

    Raises:
        RecipeError: A setting is out of its range.
        UnsupportedError: In training: the model with suppressed adapters is not the base, or DeepSpeed is used.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[Keep(texts=8, length=4)])
        >>> output = trainer.train()
    """

    rows: Any = field(default=OWN, repr=False)
    weight: float = KEEP_WEIGHT
    size: int = 2
    every: int = 2
    texts: int = 128
    length: int = 32
    seed: int = 0
    layers: str | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "size", "every", "texts", "length"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} of Keep is {getattr(self, name)}, but must be above 0")
        self._penalty: Penalty | None = None
        self._own: list[TokenRow] | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._noted: list[Tensor] = []
        self._step: int | None = None
        self._lines = LogLines("keep", self._figures)

    def _figures(self) -> dict[str, float]:
        noted, self._noted = self._noted, []
        return {"kl": float(torch.stack(noted).mean())} if noted else {}

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints: the own texts."""
        own = None if self._own is None else _packed(self._own)
        arguments = {part.name: getattr(self, part.name) for part in fields(self) if part.repr}
        rows = self.rows if isinstance(self.rows, str) else None  # other rows are not part of a checkpoint
        return {"args": {**arguments, "rows": rows}, "attributes": {"_resumed": {"own": own}}}

    def remove(self) -> None:
        """Leave the Trainer; needed only after an exception in training."""
        self._lines.remove()
        self._penalty = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the texts, or read them from a checkpoint's state."""
        self.remove()
        self._noted, self._step = [], None
        model, trainer = kwargs["model"], calling_trainer(self)
        refuse_wrappers(args, model)
        if deepspeed.is_used(trainer):
            raise UnsupportedError("Keep adds to gradients, which DeepSpeed holds itself: use DDP, or leave Keep out")
        _refuse_other_base(model, self.layers)
        rows, collate = self.rows, getattr(kwargs.get("train_dataloader"), "collate_fn", None)
        if isinstance(rows, str):
            saved = self._resumed or saved_state(state, type(self).__name__)
            packed = saved.get("own") if saved and state.global_step else None
            rows = self._own = _unpacked(packed) if packed else self._written(model, kwargs.get("train_dataloader"))
            collate = Collator(0)
        self._resumed = None
        if rows is None:
            raise RecipeError(
                "restore_callback_states_from_checkpoint has lost the rows of Keep: turn that option off, the "
                "checkpoint restores Keep's state"
            )
        self._penalty = Penalty(model, _groups(rows, self.size, collate), self.seed, self.layers)
        self._lines.begin(trainer)
        if trainer is not None:  # after the methods, whose layers of a step must be active
            handler = trainer.callback_handler
            handler.callbacks = [*(one for one in handler.callbacks if one is not self), self]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient to that of the step, which is empty."""
        assert self._penalty is not None
        if state.global_step % self.every or self._step == state.global_step:  # a stream may end in mid-step
            return
        self._step = state.global_step
        optimizer_to_training(kwargs.get("optimizer"))
        trainer = calling_trainer(self)
        context = nullcontext() if trainer is None else trainer.compute_loss_context_manager()
        factor = self.weight * self.every * loss_scale(trainer)
        with context:
            self._noted.append(self._penalty.add_gradient(state.global_step // self.every, factor))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the Trainer."""
        self.remove()

    def _written(self, model: Any, loader: Any) -> list[TokenRow]:
        """Own texts in random order, the first rank's on all ranks."""
        if is_sharded(model):
            raise UnsupportedError("a sharded base cannot write texts: give Keep texts as rows")
        groups = group_by_layer(model, self.layers)
        with suppress(groups, range(len(groups)), 0.0):
            sampled = partial(self._sampled, inner_model(model), getattr(loader, "dataset", None))
            texts: list[TokenRow] = from_first(sampled)
        return texts

    def _sampled(self, model: Any, dataset: Any) -> list[TokenRow]:
        prompts = training_prompts(dataset, self.texts // 2, self.seed)
        texts = sample_texts(model, self.texts, self.length, self.seed, prompts, least=_LEAST)
        random.Random(self.seed).shuffle(texts)
        return texts


_LEAST = 8  # tokens after a prompt (ours)


def training_prompts(rows: Any, count: int, seed: int) -> list[list[int]]:
    """Prompts of random rows, as token ids, at most `count`; none from rows without prompts, or of a stream.

    Example:
        >>> training_prompts([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}] * 4, count=2, seed=0)
        [[5, 6], [5, 6]]
    """
    if isinstance(rows, IterableDataset) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        return []
    places = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [prompt for place in places if len(prompt := _prompt(rows[place])) > 1]  # one token is the text's first


def _prompt(row: Any) -> list[int]:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        return []
    if "labels" in row:
        learned = [int(label) != IGNORED for label in row["labels"]]
    else:
        learned = next((list(row[name]) for name in _MASKS if name in row), [])
    return [int(token) for token in row["input_ids"][: next((at for at, is_in in enumerate(learned) if is_in), 0)]]


_MASKS = ("completion_mask", "assistant_masks")  # of TRL
_REMEMBERED = 512  # groups whose references stay in memory; those of further groups are computed at each visit


class Penalty:
    """The mean of KL(base ‖ model) over the label tokens of a group of texts.

    Args:
        model: Causal LM with adapters, not wrapped for several ranks.
        batches: The groups.
        seed: Seed of their order.
        layers: Path of the decoder layers, if their structure does not identify them.

    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], seed: int = 0, layers: str | None = None
    ) -> None:
        self._model = model
        self._batches = batches
        self._seed = seed
        self._layer_groups = group_by_layer(model, layers)
        self._parameters = [p for group in self._layer_groups for p in group.parameters.values()]
        self._references: dict[int, Reference] = {}

    def add_gradient(self, number: int, factor: float) -> Tensor:
        """Add the gradient of the penalty in a pass times a factor to `grad`; return the penalty, a scalar in nats."""
        with unrecorded(self._model), torch.enable_grad():
            loss = self(self.group_of(number))
            grads = torch.autograd.grad(loss * factor, self._parameters, allow_unused=True)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return loss.detach()

    def group_of(self, number: int) -> int:
        """The group of this rank in a pass: all come once, in random order, before one comes again."""
        visit = number * world_size() + rank()
        round_, place = divmod(visit, len(self._batches))
        order = torch.randperm(len(self._batches), generator=torch.Generator().manual_seed(self._seed + round_))
        return int(order[place])

    def __call__(self, number: int) -> Tensor:
        """The penalty on one group, with its graph."""
        batch = {name: value.to(model_device(self._model)) for name, value in self._batches[number].items()}
        # ranks that share a base must all make the same passes, but have visited other groups
        base = None if is_sharded(self._model) else self._references.get(number)
        if base is None:
            groups = self._layer_groups
            with torch.no_grad(), suppress(groups, range(len(groups)), 0.0):
                base = reference(self._logits(batch), TOP)
            if len(self._references) < _REMEMBERED:
                self._references[number] = base
        return divergence(self._logits(batch), base).mean()

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits at the labels, (N, V), without dropout."""
        model = self._model
        with evaluated(model), logits_at(model, label_positions(batch["labels"])):
            logits: Tensor = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits[0]
        return logits


def _refuse_other_base(model: nn.Module, layers: str | None) -> None:
    """Refuse a model whose base is not the model with suppressed adapters."""
    refuse_taken_apart(model)
    groups = group_by_layer(model, layers)
    if others := [*outside(model, groups), *itertools.chain.from_iterable(map(_not_suppressed, groups))]:
        raise UnsupportedError(
            f"{others[0]} trains, but is not part of an adapter in the decoder layers, so that the model with "
            "suppressed adapters is not the base: train adapters in the layers only, or leave Keep out"
        )


def _not_suppressed(group: LayerGroup) -> list[str]:
    """Names of a layer's trainable parameters that `suppress` leaves in place, such as biases of base layers."""
    if original_weights(group.module) is not None:
        return []
    removed: set[nn.Parameter] = set()
    for module in adapted_modules(group):
        removed |= {*module.parameters()} - {*module.get_base_layer().parameters()}
    return [f"{group.name}.{name}" for name, parameter in group.parameters.items() if parameter not in removed]


def _groups(rows: Any, size: int, collate: Any) -> Sequence[Mapping[str, Tensor]]:
    """Batches of `size` rows; an incomplete last one is left out, unless it is the only one."""
    rows = [rows[place] for place in range(len(rows))]
    if not rows:
        raise DataError("Keep has no rows: give at least one text")
    whole = max(size, len(rows) - len(rows) % size)
    batches = []
    for start in range(0, min(whole, len(rows)), size):
        batch = collated(rows[start : start + size], collate)
        if not all(isinstance(batch.get(name), Tensor) and batch[name].ndim == 2 for name in _TENSORS):
            raise DataError(
                f"the Trainer's collator makes no {', '.join(_TENSORS)} of (rows, tokens) from the rows of Keep: give "
                "rows in the form of the training rows, without packing"
            )
        if not label_positions(batch["labels"]).any():
            raise DataError(
                f"rows {start} and following of Keep have no label tokens: give texts with labels, or a larger "
                "maximum length"
            )
        batches.append({name: batch[name] for name in _TENSORS})
    return batches


_TENSORS = ("input_ids", "attention_mask", "labels")


def _packed(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Texts as JSON-ready values: their tokens in base64, the lengths of texts and of prompts."""
    ids = np.array(list(itertools.chain.from_iterable(row["input_ids"] for row in rows)), dtype="<i4")
    return {
        "tokens": base64.b64encode(ids.tobytes()).decode("ascii"),
        "lengths": [len(row["input_ids"]) for row in rows],
        "prompts": [row["labels"].count(IGNORED) for row in rows],
    }


def _unpacked(packed: Mapping[str, Any]) -> list[TokenRow]:
    ids = iter(np.frombuffer(base64.b64decode(packed["tokens"]), dtype="<i4").tolist())
    texts = [list(itertools.islice(ids, length)) for length in packed["lengths"]]
    pairs = zip(texts, packed["prompts"], strict=True)
    return [{"input_ids": text, "labels": [IGNORED] * begin + text[begin:]} for text, begin in pairs]
