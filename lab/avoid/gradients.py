"""Alignment of single rows' gradients with that of bad rows, layer by layer.

    g_il  gradient of row i for the trainable parameters of layer l
    b_l   mean gradient of the bad rows; m_l mean gradient of rows of the pool

    cosine         Σ_l ⟨g_il, b_l⟩ / √(Σ_l ‖g_il‖²)
    centred        the same of g_il − m_l and b_l − m_l
    ranks          mean over the layers of the rank of row i by ⟨g_il, b_l⟩ / ‖g_il‖, and the same centred

Centring and ranks per layer follow DRA (arXiv 2502.11411) and nn-infl (arXiv 2511.04715).

Shapes: R rows, B rows of a batch, L layers, D trainable parameters of a layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn

from lab.rows.metrics import ranks
from siftune.data.batches import by_length
from siftune.engine.groups import LayerGroup, group_by_layer
from siftune.engine.survey import Survey
from siftune.engine.tape import SampleGradients, Tape
from siftune.models.loss import label_positions, next_labels

Floats = NDArray[np.float64]
Layers = Sequence[tuple[LayerGroup, SampleGradients]]
_BATCH = 16


def alignments(model: nn.Module, rows: Dataset, bad: Dataset, center: Dataset, collate: Any) -> dict[str, Floats]:
    """Scores of rows, each (R,); the more aligned with the bad rows, the higher.

    Args:
        model: The adapted model.
        rows: Rows to score.
        bad: Rows whose direction counts.
        center: Rows of the pool for the mean gradient.
        collate: Makes a batch.
    """
    bad_L, mean_L = (_mean(model, part, collate) for part in (bad, center))
    found: dict[str, list[Any]] = {}

    def reduce(_: int, layers: Layers) -> dict[nn.Parameter, Tensor]:
        for group, grads in layers:
            g_BD, b_D, m_D = _flat(grads), bad_L[group.index], mean_L[group.index]
            c_BD, c_D = g_BD - m_D, b_D - m_D
            parts = {"dot": g_BD @ b_D, "square": (g_BD**2).sum(1), "c_dot": c_BD @ c_D, "c_square": (c_BD**2).sum(1)}
            for name, values_B in parts.items():
                found.setdefault(name, []).append(values_B.double())
        return {}

    columns: dict[str, Floats] = {}

    def note(places: Sequence[int]) -> None:
        for name, layers in found.items():
            column = columns.setdefault(name, np.zeros((len(layers), len(rows))))
            column[:, places] = torch.stack(layers).numpy()
        found.clear()

    _backward(model, rows, collate, reduce, note)
    scores = {}
    for prefix, name in (("", "cosine"), ("c_", "centred")):
        dot_LR, square_LR = columns[f"{prefix}dot"], columns[f"{prefix}square"]
        scores[name] = dot_LR.sum(0) / np.sqrt(square_LR.sum(0))
        scores[f"{name}-ranks"] = np.mean([ranks(each) for each in dot_LR / np.sqrt(square_LR + 1e-30)], axis=0)
    return scores


def _mean(model: nn.Module, rows: Dataset, collate: Any) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}

    def reduce(_: int, layers: Layers) -> dict[nn.Parameter, Tensor]:
        for group, grads in layers:
            sums[group.index] = sums.get(group.index, 0) + _flat(grads).sum(0)
        return {}

    _backward(model, rows, collate, reduce, lambda _: None)
    return {layer: total / len(rows) for layer, total in sums.items()}


def _flat(grads: SampleGradients) -> Tensor:
    return torch.cat([grad.flatten(1).float() for grad in grads.values()], dim=1)


def _backward(
    model: nn.Module, rows: Dataset, collate: Any, reduce: Any, note: Callable[[Sequence[int]], None]
) -> None:
    tape = Tape(Survey(group_by_layer(model)), lambda count: count, reduce)
    try:
        for places in by_length(list(rows["length"]), _BATCH):
            batch = collate([rows[place] for place in places])
            mask_BT = label_positions(batch["labels"])
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits[mask_BT]
            losses_N = nn.functional.cross_entropy(logits.float(), next_labels(batch["labels"]), reduction="none")
            weights_B1 = 1 / mask_BT.sum(1, keepdim=True)
            (losses_N * weights_B1.expand_as(mask_BT)[mask_BT]).sum().backward()
            note(places)
    finally:
        tape.remove()
        model.zero_grad()
