"""Units of every adapter type, and the record of one batch's choice."""

import pytest
import torch
from support.tiny import tiny

from siftune.engine.groups import group_by_layer
from siftune.methods.drivers.sample_choice import Choosing, Unit, units_of
from siftune.models.adapters.attach import attach_adapter


def test_places_count_units_and_layers_keep_their_numbers():
    """Layer 1 does not train."""
    model = attach_adapter(tiny("llama"), rank=2, targets=["q_proj", "v_proj"])
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(False)
    assert [(unit.place, unit.layer) for unit in units_of(group_by_layer(model))] == [(0, 0), (1, 2), (2, 3)]


# the record of a batch


def unit(place, layer=None):
    return Unit(place, place if layer is None else layer, f"unit {place}", ())


def choosing(samples=3, count=2):
    return Choosing(4, 7, samples, count, torch.zeros(9, samples, dtype=torch.float64))


def test_nothing_is_done_before_the_first_choice():
    assert choosing().done() is None


def test_what_was_noted_is_in_the_order_of_the_units():
    batch = choosing()
    units = [unit(5, 2), unit(0, 0), unit(3, 1)]  # backward goes from the last layer to the first, and may skip
    for place, one in enumerate(units):
        batch.note(one, torch.arange(3.0) + 10 * place, torch.tensor([place % 2, 2]))
    done = batch.done()
    assert (done.step, done.batch) == (4, 7)
    assert (done.units, done.layers) == (("unit 0", "unit 3", "unit 5"), (0, 1, 2))
    assert done.scores.tolist() == [[10, 11, 12], [20, 21, 22], [0, 1, 2]]
    assert done.selected.tolist() == [[1, 2], [0, 2], [0, 2]]
    assert (done.scores.shape, done.selected.shape) == ((3, 3), (3, 2))
    assert (done.scores.dtype, done.selected.dtype) == (torch.float32, torch.int64)


def test_a_choice_can_be_read_while_it_goes_on():
    batch = choosing()
    batch.note(unit(1), torch.zeros(3), torch.tensor([0, 1]))
    first = batch.done()
    batch.note(unit(0), torch.ones(3), torch.tensor([1, 2]))
    assert first.units == ("unit 1",)
    assert batch.done().units == ("unit 0", "unit 1")


def test_a_unit_that_chooses_again_counts_once():
    batch, one = choosing(), unit(0)
    batch.note(one, torch.zeros(3), torch.tensor([0, 1]))
    batch.note(one, torch.ones(3), torch.tensor([1, 2]))
    assert batch.done().selected.tolist() == [[1, 2]]
    assert batch.done().scores.tolist() == [[1, 1, 1]]


def test_units_with_the_same_values_are_different():
    batch = choosing()
    batch.note(Unit(0, 0, "same", ()), torch.zeros(3), torch.tensor([0, 1]))
    batch.note(Unit(0, 0, "same", ()), torch.zeros(3), torch.tensor([0, 1]))
    assert len(batch.done().units) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_keep_their_dtype(dtype):
    batch = choosing()
    batch.note(unit(0), torch.full((3,), 1 / 3, dtype=dtype), torch.tensor([0, 1]))
    assert batch.done().scores.dtype == dtype
    assert batch.done().scores[0, 0].item() == torch.tensor(1 / 3, dtype=dtype).item()


def test_a_choice_without_scores():
    batch = choosing(4, 3)
    batch.note(unit(0), None, torch.tensor([0, 1, 3]))
    done = batch.done()
    assert done.scores.shape == (1, 4)
    assert done.scores.isnan().all()
