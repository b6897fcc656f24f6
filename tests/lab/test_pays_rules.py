"""Weights on rows in the place of GAST's choice, against a loop over rows."""

import pytest
import torch
from support.adapted import adapted
from support.oracles import rest_scores, sample_gradients, summed_loss
from support.tiny import batch

from lab.pays.rules import RULES, use_rule
from siftune import GAST
from siftune.base.errors import RecipeError
from siftune.engine.groups import group_by_layer


def by_hand(scores):
    """Weights of the rows, with plain numbers."""
    raw = [max(0.0, score) for score in scores]
    whole = sum(raw)
    return [len(raw) * one / whole for one in raw] if whole else [1.0] * len(raw)


def test_gradients_are_the_weighed_rows():
    model = adapted().double()
    inputs = batch(model, 6)
    single = sample_gradients(model, inputs)
    gast = GAST(2, "rest", choice="topk")
    use_rule([gast], "relu")
    with gast.attach(model) as sift:
        summed_loss(model, inputs).backward()
    layers = [list(group.parameters.values()) for group in group_by_layer(model)]
    scores = [rest_scores(single, parameters) for parameters in layers]
    torch.testing.assert_close(sift.last.scores, torch.stack(scores), rtol=1e-9, atol=1e-12)
    for parameters, scores_S in zip(layers, scores, strict=True):
        weights = by_hand(scores_S.tolist())
        for parameter in parameters:
            wanted = sum(weight * grad for weight, grad in zip(weights, single[parameter], strict=True))
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-13)


def test_rows_without_a_gradient_count_nothing():
    scores, live = torch.tensor([2.0, -1.0, 1.0, 5.0]), torch.tensor([True, True, True, False])
    torch.testing.assert_close(RULES["relu"](scores, live), torch.tensor([2.0, 0.0, 1.0, 0.0]))
    none_above = RULES["relu"](-scores.abs(), live)
    torch.testing.assert_close(none_above, torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_a_rule_wants_gast_with_scores():
    with pytest.raises(RecipeError, match="no rule 'softmax'"):
        use_rule([GAST()], "softmax")
    with pytest.raises(RecipeError, match="not choice random"):
        use_rule([GAST(choice="random", support="rest")], "relu")
    with pytest.raises(RecipeError, match="with method gast"):
        use_rule([], "relu")
