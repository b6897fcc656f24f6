"""Rows for scoring: a generator of its own, every kind of data set, and a mean that counts tokens."""

import pytest
import torch
from datasets import Dataset

from siftune.base.errors import DataError
from siftune.methods.drivers.batches import RowDraws, UserBatches, label_weight


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def collate(rows):
    torch.rand(1)  # a collator that masks at random
    return {"rows": rows}


def drawn(batches):
    return [row for batch in batches for row in batch["rows"]]


class Stream:
    """An iterable without length, which counts how often it starts."""

    def __init__(self, count):
        self.count, self.starts = count, 0

    def __iter__(self):
        self.starts += 1
        return iter(range(self.count))


@pytest.mark.parametrize("data", [list(range(20)), Dataset.from_dict({"x": list(range(20))})])
def test_rows_are_drawn_without_replacement_in_batches(data):
    batches = RowDraws(data, collate, generator()).draw(10, 4)
    assert [len(batch["rows"]) for batch in batches] == [4, 4, 2]
    rows = [row["x"] if isinstance(row, dict) else row for row in drawn(batches)]
    assert len(set(rows)) == 10
    assert set(rows) <= set(range(20))
    assert rows != sorted(rows)


def test_the_generator_decides():
    data = list(range(50))
    first, same, other = (drawn(RowDraws(data, collate, generator(s)).draw(8, 8)) for s in (0, 0, 1))
    assert first == same != other
    draws = RowDraws(data, collate, generator())
    assert drawn(draws.draw(8, 8)) != drawn(draws.draw(8, 8))


def test_fewer_rows_than_wanted():
    assert sorted(drawn(RowDraws([1, 2, 3], collate, generator()).draw(10, 2))) == [1, 2, 3]


@pytest.mark.parametrize("data", [list(range(20)), Stream(20)])
def test_the_global_generator_stays_where_it_was(data):
    before = torch.get_rng_state()
    RowDraws(data, collate, generator()).draw(10, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_is_walked_and_starts_again():
    stream = Stream(5)
    draws = RowDraws(stream, collate, generator())
    assert drawn(draws.draw(3, 2)) == [0, 1, 2]
    assert drawn(draws.draw(3, 2)) == [3, 4, 0]
    assert (draws.taken, stream.starts) == (6, 2)


def test_a_stream_goes_on_after_a_resume():
    draws = RowDraws(Stream(5), collate, generator(), taken=6)
    assert drawn(draws.draw(3, 3)) == [1, 2, 3]
    assert draws.taken == 9


@pytest.mark.parametrize("data", [[], Stream(0)])
def test_no_rows(data):
    with pytest.raises(DataError, match="rows"):
        RowDraws(data, collate, generator()).draw(4, 4)


def test_given_batches_start_again_and_go_on_after_a_resume():
    given = UserBatches(["a", "b", "c"])
    assert [given.draw(9, 9) for _ in range(4)] == [["a"], ["b"], ["c"], ["a"]]
    again = UserBatches(["a", "b", "c"])
    again.taken = given.taken
    assert again.draw(9, 9) == ["b"]


def test_given_batches_that_end():
    given = UserBatches(iter(["a"]))
    given.draw(4, 4)
    for ended in (given, UserBatches([])):
        with pytest.raises(DataError, match="batches"):
            ended.draw(4, 4)


def test_a_batch_counts_for_the_labels_that_it_predicts():
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, -100, 8]])
    assert label_weight({"labels": labels}) == 3.0
    assert label_weight({"input_ids": torch.zeros(4, 2), "return_loss": True}) == 4.0
    assert label_weight({"labels": torch.zeros(5)}) == 5.0
    assert label_weight({}) == 1.0
