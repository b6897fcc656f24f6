"""`siftune recipe`."""

from support.commands import error_of, siftune

from siftune.cli.main import main
from siftune.recipe.presets import PRESETS, preset_text


def test_a_recipe_is_printed_alone(capsys):
    assert main(["recipe", "gast"]) == 0
    assert capsys.readouterr().out == preset_text("gast")
    result, _ = siftune(capsys, "recipe")
    assert [*result["recipes"]] == [*PRESETS]


def test_an_unknown_name(capsys):
    assert "did you mean gast" in error_of(capsys, "recipe", "gats")
