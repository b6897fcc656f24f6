"""Turns that come round fairly, and windows that cover all layers."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.methods.lisa.maths import deal, window_starts


def rounds(everyone, count, times, seed=0):
    """What comes, `times` times one after the other."""
    generator, waiting = torch.Generator().manual_seed(seed), []
    for _ in range(times):
        come, waiting = deal(waiting, everyone, count, generator)
        yield come


@given(members=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
def test_visits_never_differ_by_more_than_one(members, data, seed):
    count = data.draw(st.integers(1, members))
    visits = Counter(dict.fromkeys(range(members), 0))
    for come in rounds(range(members), count, 30, seed):
        assert len(set(come)) == len(come) == count
        visits.update(come)
        assert max(visits.values()) - min(visits.values()) <= 1


def test_a_round_has_a_random_order():
    draws = 6000
    pairs = Counter(tuple(come[0] for come in rounds(range(4), 1, 2, seed)) for seed in range(draws))
    assert set(pairs) == set(itertools.permutations(range(4), 2))
    for count in pairs.values():
        assert count / draws == pytest.approx(1 / 12, abs=4 * (11 / 144 / draws) ** 0.5)


def test_what_is_missing_in_a_round_comes_out_of_the_next():
    come, waiting = deal([7], [5, 6, 7], 2, torch.Generator().manual_seed(0))
    assert come[0] == 7
    assert sorted([*come[1:], *waiting]) == [5, 6, 7]


@given(layers=st.integers(1, 40), data=st.data(), in_turn=st.booleans())
def test_windows_cover_all_layers_and_lie_within(layers, data, in_turn):
    first = data.draw(st.integers(0, layers - 1))
    count = data.draw(st.integers(1, layers - first))
    windows = [range(start, start + count) for start in window_starts(first, layers, count, in_turn)]
    assert {layer for window in windows for layer in window} == set(range(first, layers))
    if in_turn:
        assert len(windows) == -(-(layers - first) // count)
    else:
        assert [window[0] for window in windows] == list(range(first, layers - count + 1))
