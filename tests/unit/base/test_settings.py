"""Settings: the values that a field allows, and what an error names."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest
from pydantic import Field, FiniteFloat
from pydantic.dataclasses import dataclass

from siftune import GAST, IST
from siftune.base.errors import RecipeError
from siftune.base.settings import (
    CONFIG,
    ELSEWHERE,
    Count,
    CountOrShare,
    SettingError,
    Share,
    Validated,
    converted,
    described,
    help_of,
    leaves,
    made,
    nearest,
    types_of,
)
from siftune.cli.sift import Options as Sift
from siftune.methods import all_parts
from siftune.methods.options import GASTSettings, ISTSettings
from siftune.recipe.schema import Recipe


@dataclass(config=CONFIG)
class Plain(Validated):
    """Options without a group."""

    rows: Count
    """Rows."""
    share: Share = 0.5
    """Share of them."""
    place: Path | None = None
    """Where."""
    gast: GASTSettings = Field(default_factory=GASTSettings)


@pytest.mark.parametrize(
    "bad",
    [
        {"interval": 2.5}, {"interval": "2"}, {"interval": True}, {"interval": 0}, {"active": "half"}, {"active": 0.0},
        {"active": 1.01}, {"active": float("nan")}, {"active": float("inf")}, {"interval": -1},
        {"candidates": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [ISTSettings, IST], ids=["settings", "callback"])
def test_a_value_that_a_field_does_not_allow_is_refused(kind, bad):
    (name,) = bad
    with pytest.raises(SettingError) as caught:
        kind(**bad)
    assert caught.value.field == f"ist.{name}"
    assert caught.value.valid == described(types_of(ISTSettings)[name])


def test_an_integer_is_a_number_and_an_unknown_setting_is_refused():
    assert ISTSettings(active=1).active == 1.0
    with pytest.raises(RecipeError, match="select"):
        GASTSettings(selct=3)


def test_values_without_names_are_named_by_their_places():
    with pytest.raises(SettingError) as caught:
        ISTSettings(0.5, "ten")
    assert caught.value.field == "ist.interval"
    assert str(caught.value).startswith("ist.interval is 'ten', but must be")
    with pytest.raises(RecipeError, match="ISTSettings has 4 settings, but got 5 values"):
        ISTSettings(0.5, 10, 16, 3, 0)


def test_a_count_and_a_share_are_told_apart():
    assert [type(GASTSettings(select=value).select) for value in (1, 1.0)] == [int, float]
    with pytest.raises(SettingError):
        GASTSettings(select=2.0)


def test_a_callback_keeps_the_order_of_its_settings_and_shows_plain_types():
    assert GAST(0.5, "rest").support == "rest"
    shown = inspect.signature(GAST).parameters
    assert [*shown][:2] == ["select", "support"]
    assert shown["select"].annotation == int | float
    assert shown["select"].default == 0.75
    assert all(f"{name}: {line}" in " ".join(GAST.__doc__.split()) for name, line in help_of(GASTSettings).items())


def test_made_reads_text_and_names_the_option():
    assert made(
        Plain, {"rows": ("3", "--rows"), "gast.select": ("0.5", "--gast.select"), "place": ("a", "--place")}
    ) == (Plain(3, place=Path("a"), gast=GASTSettings(0.5)))
    for given, words in (
        ({"rows": ("few", "--rows")}, "--rows is few"),
        ({"rows": (1, "x"), "gast.select": ("all", "--gast.select")}, "--gast.select is all"),
        ({}, "--rows must be given; try"),
    ):
        with pytest.raises(RecipeError) as caught:
            made(Plain, given, {"rows": "--rows"}, "; try")
        assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        ("5e-4", float, 5e-4),
        ("8", Count | None, 8),
        ("1", CountOrShare, 1),
        ("1.0", CountOrShare, 1.0),
        ("None", Count | None, None),
        ("3", str, "3"),
        ("None", str, "None"),
        ("a", tuple[str, ...] | None, ("a",)),
        (None, tuple[str, ...] | None, None),
        (["1", 2], tuple[int, ...] | None, (1, 2)),
        ("a", str | tuple[str, ...], "a"),
        (["a", "b"], str | tuple[str, ...], ("a", "b")),
        ("x", Path, Path("x")),
        ("9" * 5000, int, "9" * 5000),
        (True, int, True),
        ("true", bool | Count, True),
        ("False", bool | Count, False),
        ("true", bool | str, "true"),
        ("2", bool | Count, 2),
    ],
)
def test_values_as_they_are_written(value, hint, result):
    found = converted(value, hint)
    assert (found, type(found)) == (result, type(result))


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Annotated[float, Field(gt=0, lt=1)] | None, "a number, above 0 and below 1"),
        (FiniteFloat | None, "a finite number"),
        (Literal["a", "b"], "one of a, b"),
        (bool | str, "true or false or text"),
        (tuple[Share, ...], "a list of numbers, each above 0 and at most 1"),
        (tuple[Literal["a", "b"], ...], "a list of names, each one of a, b"),
    ],
)
def test_a_type_as_text(hint, words):
    assert described(hint) == words


@pytest.mark.parametrize("kind", [Recipe, *(part.settings for part in all_parts())], ids=lambda kind: kind.__name__)
def test_every_number_has_a_range_and_every_setting_a_line_of_help(kind):
    groups = {part.settings.group for part in all_parts()}
    hints = {name: hint for name, hint in types_of(kind).items() if name not in groups}
    for name, hint in hints.items():
        for leaf, marks in leaves(hint):
            assert leaf not in (int, float) or marks, name
    lines = help_of(kind)
    assert [name for name in lines if name not in groups] == list(hints)
    assert all(line.endswith(".") for line in lines.values())


def test_nearest_knows_the_names_of_other_trainers():
    names = [field.name for field in fields(Recipe)]
    assert nearest("active", ["lr", "rst.active", "ist.active"]) == "rst.active or ist.active"
    assert nearest("per-device-train-batch-size", names) == "batch_size"
    assert nearest("Epoch", names) == "epochs"
    assert nearest("qqqqq", names) is None
    assert {*ELSEWHERE.values()} <= {*names, *(field.name for field in fields(Sift))}
    assert get_args(Count)[0] is int
