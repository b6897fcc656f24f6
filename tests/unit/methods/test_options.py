"""Ranges of the options, counts and shares, and batches in which no row is left out."""

import logging
import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.trainers import train

from siftune import GAST
from siftune.base.errors import RecipeError
from siftune.methods import METHODS, all_parts
from siftune.methods.options import GASTSettings, count_of, selects_all
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe

# group and option -> values out of range
BAD = {
    "rst.active": [0.0, 1.5, -0.5, 2],
    "ist.active": [0, 1.5],
    "ist.interval": [0, 2.5, -1, math.inf],
    "ist.score_batch_size": [0],
    "ist.candidates": [1],
    "gast.select": [0, 0.0, 1.5, -1, True, math.nan],
    "gast.support": ["rset"],
    "gast.support_size": [0, 1.5],
    "gast.support_every": [0],
    "gast.choice": ["best"],
    "gast.score": ["euclidean"],
}


def test_every_option_has_values_out_of_range():
    options = {f"{part.settings.group}.{name}" for part in all_parts() for name in part.settings.names(part.settings)}
    assert set(BAD) == options


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in BAD.items() for value in values])
def test_a_value_out_of_range_is_refused(option, value):
    group, _, name = option.partition(".")
    (settings,) = [part.settings for part in all_parts() if part.settings.group == group]
    with pytest.raises(RecipeError, match=option):
        settings(**{name: value})


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_selection_ends_within_the_training(share):
    with pytest.raises(RecipeError, match="select_until"):
        GAST(select_until=share)


def test_a_mean_of_support_gradients_needs_support_rows():
    for settings in ({"support": "rest"}, {"choice": "random"}):
        with pytest.raises(RecipeError, match="support_every"):
            GASTSettings(support_every=2, **settings)


@given(share=st.fractions(0, 1).filter(bool), total=st.integers(1, 200))
@example(share=Fraction(29, 100), total=100)  # whose product of floats is 28.999…
def test_a_share_is_rounded_down_exactly(share, total):
    assert count_of(float(share), total) == max(1, share.numerator * total // share.denominator)


@given(count=st.integers(1, 50), total=st.integers(1, 50))
def test_a_count_is_at_most_all(count, total):
    assert count_of(count, total) == min(count, total)


@pytest.mark.parametrize(
    ("settings", "samples", "everything"),
    [
        (GASTSettings(), 1, True),
        (GASTSettings(), 2, False),
        (GASTSettings(select=0.99), 16, False),
        (GASTSettings(select=1.0), 1, False),  # an explicit choice
        (GASTSettings(select=4), 4, True),
        (GASTSettings(select=3), 4, False),
    ],
)
def test_batches_of_which_all_rows_would_be_followed(settings, samples, everything):
    assert selects_all(settings, samples) == everything


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if any(p.rows for p in each.parts)])
def test_the_command_line_refuses_such_batches(method):
    with pytest.raises(RecipeError, match="batch-size"):
        check(Recipe(train="rows.jsonl", method=method, batch_size=1))


def test_other_methods_train_on_single_rows():
    check(Recipe(train="rows.jsonl", method="ist", batch_size=1))


@pytest.mark.parametrize(("method", "warnings"), [(GAST(), 1), (GAST(select=1.0), 0)])
def test_a_trainer_warns_once(tmp_path, caplog, method, warnings):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, method, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2)
    assert caplog.text.count("per_device_train_batch_size") == warnings
