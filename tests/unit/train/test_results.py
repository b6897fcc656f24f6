"""Shares of rows that were followed, by source."""

import torch

from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.train.results import FollowedShares


def choice(*selected):
    layers = tuple(range(len(selected)))
    return SampleChoice(0, 0, tuple(map(str, layers)), layers, torch.zeros(len(layers), 3), torch.tensor(selected))


def test_shares_are_means_over_layers_of_all_rows_that_came():
    followed = FollowedShares(["web", "books", "web", "web"])
    followed.add(choice([0, 1], [0, 2]), [3, 1, 0])  # web: 1 + ½ of two; books: ½ of one
    followed.add(choice([1, 2], [0, 1]), [1, 2, 0])  # web: 1½ of two; books: ½ of one
    assert followed.shares() == {"books": 0.5, "web": 0.75}
    assert FollowedShares([]).shares() == {}
