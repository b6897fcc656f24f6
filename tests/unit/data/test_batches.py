"""Batches: padding, similar lengths, and a target's rows in the last part of a run."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.data.batches import Collator, TargetLast, by_length, order_of_run

ids = st.lists(st.integers(4, 99), min_size=1, max_size=7)


@given(st.lists(ids, min_size=1, max_size=5), st.integers(0, 3))
def test_collator_pads_on_the_right(sequences, pad):
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]], "length": len(ids)} for ids in sequences]
    batch = Collator(pad)(rows)
    width = batch["input_ids"].shape[1]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert width == max(map(len, sequences))
    for i, sequence in enumerate(sequences):
        padding = width - len(sequence)
        assert batch["input_ids"][i].tolist() == sequence + [pad] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(sequence) + [0] * padding
        assert batch["labels"][i].tolist() == [-100, *sequence[1:]] + [-100] * padding


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9))
def test_batches_hold_every_row_once_the_longest_first(lengths, batch_size):
    batches = list(by_length(lengths, batch_size))
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)


runs = {
    "aimed": st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda a: any(a) and not all(a)),
    "draws": st.integers(1, 150),
    "last": st.floats(0.01, 1),
    "seed": st.integers(0, 3),
}


@given(**runs)
def test_the_targets_rows_come_last_and_no_more_often_than_before(aimed, draws, last, seed):
    order = order_of_run(np.array(aimed), draws, last, seed)
    assert len(order) == -(-draws // len(aimed)) * len(aimed)
    drawn = [aimed[place] for place in order[:draws]]
    share = sum(aimed) / len(aimed)
    assert sum(drawn) == round(draws * share)
    begin = draws - max(round(draws * last), sum(drawn))
    assert not any(drawn[:begin])


@given(**runs)
def test_every_row_comes_as_often_as_others_of_its_kind_but_for_one(aimed, draws, last, seed):
    drawn = order_of_run(np.array(aimed), draws, last, seed)[:draws]
    counts = Counter(drawn.tolist())
    for kind in (True, False):
        times = [counts[place] for place in range(len(aimed)) if aimed[place] == kind]
        assert max(times) - min(times) <= 1


def test_epochs_are_parts_of_one_order():
    aimed = [False] * 6 + [True] * 2
    sampler = TargetLast(aimed, draws=20, last=0.5, seed=3)
    drawn = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler)) == 8
        drawn += list(sampler)
    assert drawn == order_of_run(np.array(aimed), 20, 0.5, 3).tolist()


def test_a_last_part_of_the_complete_run_spreads_the_rows():
    aimed = np.array([False] * 300 + [True] * 100)
    halves = np.array_split(aimed[order_of_run(aimed, 400, 1.0, 0)], 2)
    assert [half.mean() for half in halves] == pytest.approx([0.25, 0.25], abs=0.06)
