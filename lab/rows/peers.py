"""Scores by other tools: two models, each trained on half of the pool, score the other half.

    cross-loss    mean loss of a row's labels under the model that was not trained on it
    cross-least   minus the probability of its least likely label there
    cleanlab      1 − its label quality by cleanlab (`token_classification`, Wang & Mueller, arXiv 2210.03920), from the
                  probabilities of the labels that the pool has, and of all others together as one more

Each takes as many steps as half of the rows are worth, so that a pool costs the same as training once, and a pass over
all rows more. Self-influence, which bergson and dattri rank rows by, is the squared length of a row's gradient where
no curvature is estimated (TracIn, Pruthi et al., NeurIPS 2020): `norm` in the scores of a run, at first sight.

Shapes: R rows, T labels of one of them, V vocabulary, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lab.training import Record, Work
from siftune.data.batches import by_length
from siftune.models.loss import label_positions, logits_at, next_labels
from siftune.models.modules import evaluating, model_device

_BATCH = 64
Floats = NDArray[np.float64]
Labelled = tuple[list[NDArray[np.int64]], list[Floats]]  # by row: (T,) classes, (T, K) probabilities


@dataclass
class Fold(Work):
    """Trains on a pool's rows, and then looks at others in the place of the held-out ones.

    Attributes:
        others: The rows it looks at.
        classes: Token ids that have a class of their own.
    """

    others: Sequence[Record] = ()
    classes: Sequence[int] = field(default_factory=list)

    def _measure(self, model: nn.Module) -> Record:
        return {"labelled": probabilities(model, self.tokenized(self.others), self.collate, self.classes)}


def classes_of(data: Any) -> list[int]:
    """Token ids that are labels somewhere in tokenised rows, ascending."""
    return sorted({label for labels in data["labels"] for label in labels if label >= 0})


def probabilities(model: nn.Module, data: Any, collate: Any, classes: Sequence[int]) -> Labelled:
    """Probabilities of the classes at every label, in the order of the rows; the last class is any other token.

    Args:
        model: A causal language model.
        data: Tokenised rows.
        collate: Makes a batch of rows.
        classes: Token ids, among them every label of the rows.
    """
    number = {token: place for place, token in enumerate(classes)}
    labels_R: list[Any] = [None] * len(data)
    probs_R: list[Any] = [None] * len(data)
    for places in by_length(list(data["length"]), _BATCH):
        batch = {k: v.to(model_device(model)) for k, v in collate([data[place] for place in places]).items()}
        mask_BT = label_positions(batch["labels"])
        with evaluating(model), logits_at(model, mask_BT):
            found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        probs_NV = found.logits[0].double().softmax(1).cpu()
        own_NK = probs_NV[:, list(classes)]
        probs_NK = torch.cat([own_NK, (1 - own_NK.sum(1, keepdim=True)).clamp_min(0)], 1).numpy()
        classes_N = np.array([number[token] for token in next_labels(batch["labels"]).tolist()])
        row_N = mask_BT.nonzero()[:, 0].cpu().numpy()
        for at, place in enumerate(places):
            labels_R[place], probs_R[place] = classes_N[row_N == at], probs_NK[row_N == at]
    return labels_R, probs_R


def crossed(labels: Sequence[NDArray[np.int64]], probs: Sequence[Floats]) -> dict[str, Floats]:
    """Scores of all rows, larger for rows that are more likely bad; each (R,)."""
    from cleanlab.token_classification.rank import get_label_quality_scores

    given = [p[np.arange(len(own)), own] for own, p in zip(labels, probs, strict=True)]
    quality, _ = get_label_quality_scores([own.tolist() for own in labels], list(probs))
    return {
        "cross-loss": np.array([-np.log(p.clip(1e-300)).mean() for p in given]),
        "cross-least": np.array([-p.min() for p in given]),
        "cleanlab": 1 - np.asarray(quality),
    }
