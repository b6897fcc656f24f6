"""Layer and sample selection where some layers' own weights train: against the obvious computation."""

import pytest
import torch
from support.oracles import rest_scores, sample_gradients, summed_loss
from support.tiny import batch, tiny

from siftune import GAST, IST
from siftune.engine.groups import group_by_layer
from siftune.models.adapters.full import OpenLayers

OUTER = (0, 1, -2, -1)
FAMILIES = ("llama", "gemma3")


def opened(family="llama", layers=OUTER, depth=6):
    model = tiny(family, layers=depth).double()
    OpenLayers(model, layers)
    return model


def backward(model, inputs):
    model.zero_grad()
    summed_loss(model, inputs).backward()


def tolerances(family):
    # Gemma's norms multiply in float32
    return {"rtol": 1e-4, "atol": 1e-6} if "gemma" in family else {"rtol": 1e-9, "atol": 1e-13}


@pytest.mark.parametrize("family", FAMILIES)
def test_gast_follows_the_chosen_rows(family):
    model = opened(family)
    inputs = batch(model, 4)
    with GAST(2, "rest").attach(model) as sift:
        backward(model, inputs)
    groups, choice = group_by_layer(model), sift.last
    assert choice.layers == (0, 1, 4, 5)
    single = sample_gradients(model, inputs)
    for group, scores, selected in zip(groups, choice.scores, choice.selected, strict=True):
        own = list(group.parameters.values())
        torch.testing.assert_close(scores, rest_scores(single, own), check_dtype=False, **tolerances(family))
        for name, parameter in group.parameters.items():
            wanted = single[parameter][selected].sum(0) * 2
            torch.testing.assert_close(
                parameter.grad, wanted, **tolerances(family), msg=lambda text, name=name: f"{name}: {text}"
            )


def test_ist_scores_layers_by_their_damped_response():
    model = opened()
    generator = torch.Generator().manual_seed(0)
    originals = {p: p.detach().clone() for group in group_by_layer(model) for p in group.parameters.values()}
    with torch.no_grad():
        for parameter in originals:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    rows = batch(model, 4, seed=5)
    with IST(0.5, interval=1, candidates=3).attach(model, batches=[rows]) as sift:
        choice = sift.step()
    groups = {group.index: group for group in group_by_layer(model)}
    tuned = {p: p.detach().clone() for p in originals}
    wanted = []
    for layers in choice.suppressed:
        with torch.no_grad():
            for number in layers:
                for p in groups[number].parameters.values():
                    p.copy_(originals[p] + 0.25 * (tuned[p] - originals[p]))
            wanted.append(float(model(**rows).loss))
            for p, value in tuned.items():
                p.copy_(value)
    assert choice.losses == pytest.approx(wanted, rel=1e-9)
    assert len(set(choice.losses)) > 1
