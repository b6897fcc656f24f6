"""Rows that are drawn by themselves."""

import math

import pytest
import torch
from accelerate import skip_first_batches
from support.trainers import rows
from torch.utils.data import DataLoader

from siftune.data.batches import Collator
from siftune.methods.dp.sampling import PoissonBatches, collate_any, parts
from siftune.methods.dp.secret import Secret

DRAWS = 4000


def included(count, rate, seed=0):
    """(draws, rows): which rows were drawn."""
    batches, drawn = PoissonBatches(count, rate, Secret(seed)), torch.zeros(DRAWS, count)
    for step in range(DRAWS):
        drawn[step, batches.draw(step)] = 1
    return drawn


def test_every_row_is_drawn_with_the_chance_and_by_itself():
    count, rate = 30, 0.2
    drawn = included(count, rate)
    spread = math.sqrt(rate * (1 - rate) / DRAWS)
    assert float((drawn.mean(0) - rate).abs().max()) < 4 * spread
    sizes = drawn.sum(1)
    assert float(sizes.var()) == pytest.approx(count * rate * (1 - rate), rel=0.1), "shuffled batches have one size"
    off_diagonal = torch.corrcoef(drawn.T)[~torch.eye(count, dtype=torch.bool)]
    assert float(off_diagonal.abs().max()) < 4.5 / math.sqrt(DRAWS)
    following = [float(torch.corrcoef(torch.stack([row[1:], row[:-1]]))[0, 1]) for row in drawn.T]
    assert max(map(abs, following)) < 4.5 / math.sqrt(DRAWS), "a row's draws depend on the step before"


def test_steps_without_rows_come_as_often_as_they_must():
    empty = float((included(10, 0.1).sum(1) == 0).float().mean())
    wanted = 0.9**10
    assert empty == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / DRAWS))


def test_with_chance_one_all_rows_are_drawn():
    assert PoissonBatches(7, 1.0, Secret(0)).draw(3) == list(range(7))


def test_stretches_of_steps_follow_each_other():
    batches = PoissonBatches(24, 4 / 24, Secret(1))
    assert len(batches) == 6
    first = list(batches)
    batches.set_epoch(1)
    assert [*first, *batches] == [batches.draw(step) for step in range(12)]
    loader = skip_first_batches(DataLoader(range(24), batch_sampler=batches, collate_fn=list), 2)
    assert list(loader) == [batches.draw(step) for step in range(8, 12)]


def test_chance_is_secret_and_not_the_global_generators():
    before = torch.get_rng_state()
    one, other = (PoissonBatches(1000, 0.5, Secret()).draw(0) for _ in range(2))
    assert one != other
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    again = PoissonBatches(1000, 0.5, Secret()).draw(0)
    torch.manual_seed(0)
    assert again != PoissonBatches(1000, 0.5, Secret()).draw(0), "the global seed decides"


def test_a_batch_may_have_no_rows():
    data, collate = rows(), Collator(0)
    full, none = collate_any(collate, data, [data[0]]), collate_any(collate, data, [])
    assert full.keys() == none.keys()
    assert all(len(value) == 0 and value.dtype == full[name].dtype for name, value in none.items())
    assert parts(none, 4) == []


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3])])
def test_parts_are_even_and_hold_the_rows_in_order(count, sizes):
    lengths = [3 + number % 5 for number in range(count)]
    given = [{"input_ids": [9] * n, "labels": [9] * n, "row": i} for i, n in enumerate(lengths)]
    found = parts(Collator(0)(given), 4)
    assert [len(part["labels"]) for part in found] == sizes
    assert [row for part in found for row in part["row"].tolist()] == list(range(count))
    seen = 0
    for part, size in zip(found, sizes, strict=True):
        assert part["input_ids"].shape == part["labels"].shape == (size, max(lengths[seen : seen + size]))
        assert part["attention_mask"].sum(1).tolist() == lengths[seen : seen + size]
        seen += size
