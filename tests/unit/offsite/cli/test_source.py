"""Kits in the commands of the main job."""

import re

import pytest
from support.commands import siftune

from siftune.base.errors import KitError
from siftune.cli.subjects import find_subject, kind_of_subject, load_subject
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import Recipe


def test_a_run_on_a_kit(parties, capsys):
    found, _ = siftune(capsys, "ask", parties / "run", "1 and 1?", "--max-new-tokens", "12")
    assert [*found["answers"][0]] == ["prompt", "base", "tuned"]
    alone, _ = siftune(capsys, "ask", parties / "kit", "1 and 1?", "--template", "none", "--max-new-tokens", "12")
    assert alone["answers"][0]["base"] == found["answers"][0]["base"]
    assert alone["answers"][0]["tuned"] is None


def test_a_return_whose_kit_is_not_there(base, tmp_path):
    """As after a move: what the recipe names is a model now."""
    run = tmp_path / "run"
    (run / "return").mkdir(parents=True)
    (run / "return" / "manifest.json").write_text("{}")
    (run / "recipe.yaml").write_text(recipe_to_yaml(Recipe(model=str(base))))
    subject = find_subject(str(run))
    assert kind_of_subject(subject) is not None
    with pytest.raises(KitError, match=re.escape(f"{run}/return is a return, but {base} is no kit")):
        load_subject(subject)
