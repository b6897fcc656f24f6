"""Batches of which all rows would be followed: refused on the command line, told of in anybody's Trainer."""

import logging

import pytest
from support.trainers import train

from siftune import GAST, GREATS
from siftune.base.errors import RecipeError
from siftune.methods.drivers.followed import can_look_back, chooses_nothing
from siftune.methods.gast.settings import GASTSettings
from siftune.methods.greats.settings import GREATSSettings
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe


@pytest.mark.parametrize(
    ("settings", "samples", "nothing"),
    [
        (GASTSettings(), 1, True),
        (GASTSettings(), 2, False),
        (GASTSettings(select=0.99), 16, False),
        (GASTSettings(select=1.0), 1, False),  # somebody means it
        (GASTSettings(select=1), 1, True),
        (GASTSettings(select=4), 4, True),
        (GASTSettings(select=9), 4, True),
        (GASTSettings(select=3), 4, False),
        (GASTSettings(select=0.5, among="recent"), 1, False),
        (GREATSSettings(), 1, True),
        (GREATSSettings(), 2, False),
    ],
)
def test_when_nothing_is_chosen(settings, samples, nothing):
    assert chooses_nothing(settings, samples) == nothing


@pytest.mark.parametrize(
    ("settings", "could"),
    [
        (GASTSettings(), True),
        (GASTSettings(support="momentum"), True),
        (GASTSettings(support="rest"), False),
        (GASTSettings(support="rest", choice="random"), True),
        (GASTSettings(select=2), False),
        (GREATSSettings(), False),
    ],
)
def test_where_recent_rows_would_help(settings, could):
    """As the settings themselves see it: they refuse the combination where it does not."""
    assert can_look_back(settings) == could
    if isinstance(settings, GASTSettings):
        try:
            GASTSettings(**{**settings.to_dict(), "among": "recent"})
        except RecipeError:
            assert not could
        else:
            assert could


RECENT = "give --gast.among recent, by which a row competes with those of the last steps, or a larger --batch-size"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "gast", "batch_size": 1, "accumulate": 16}, f"of a forward pass of 1 row, .*{RECENT}$"),
        ({"method": "ist+gast", "batch_size": 1}, f"gast.select 0.75 follows every row .*{RECENT}$"),
        ({"method": "gast", "batch_size": 1, "gast": GASTSettings(support="rest")}, "give a larger --batch-size$"),
        ({"method": "greats", "batch_size": 1}, "greats.select 0.5 follows every row .*: give a larger --batch-size$"),
        (
            {"method": "gast", "batch_size": 4, "gast": GASTSettings(select=8)},
            "of 4 rows, .*give a larger --batch-size, or a --gast.select below 8$",
        ),
    ],
)
def test_the_command_line_refuses(given, said):
    with pytest.raises(RecipeError, match=said):
        check(Recipe(train="rows.jsonl", **given))


def test_what_chooses_passes():
    check(Recipe(train="rows.jsonl", method="gast", batch_size=1, gast=GASTSettings(among="recent")))
    check(Recipe(train="rows.jsonl", method="dense", batch_size=1))
    check(Recipe(train="rows.jsonl", method="ist", batch_size=1))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            GAST(select=0.75),
            "GAST(select=0.75) follows every row of a forward pass of 1 row, so that nothing is chosen",
        ),
        (
            GAST(select=0.75),
            'set among="recent", by which a row competes with those of the last steps, or raise per_dev',
        ),
        (GAST(support="rest"), "so that nothing is chosen: raise per_device_train_batch_size"),
        (GREATS(), "GREATS(select=0.5) follows every row"),
    ],
)
def test_a_trainer_is_told_once_before_the_start(tmp_path, caplog, method, said):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, method, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2)
    assert caplog.text.count(said) == 1


def test_a_trainer_is_not_told_where_there_is_choice(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "siftune"):
        train(tmp_path, GAST(select=2, support="rest"), max_steps=1)
    assert not caplog.records
