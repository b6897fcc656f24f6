"""Recipes: what YAML and flags may say, and how each mistake is told."""

import subprocess
import sys
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from siftune.base.errors import RecipeError
from siftune.base.settings import ELSEWHERE, Range, help_of, marks_of, nearest
from siftune.methods import METHODS, all_parts
from siftune.methods.options import GASTSettings, ISTSettings, LISASettings
from siftune.models.adapters.registry import ADAPTER_TYPES
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe, recipe_to_yaml
from siftune.recipe.schema import Recipe, compared_with, resolve_recipe, select_until, settings_of
from siftune.train.rates.grid import rate_text

_FEW = {"method": "gast", "target": "few.jsonl", "gast": GASTSettings(**GASTSettings.with_target)}


@pytest.fixture
def recipe_file(tmp_path):
    def write(text, name="r.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_an_empty_file_is_a_recipe_of_defaults(recipe_file):
    assert load_recipe(recipe_file("")) == Recipe()
    assert load_recipe(recipe_file("# only a comment\n")) == Recipe()
    assert load_recipe() == Recipe()


def test_values_get_the_types_of_their_fields(recipe_file):
    recipe = load_recipe(
        recipe_file("method: rst\nepochs: 2\nlr: 5e-4\ntargets: [q_proj, v_proj]\nsteps: null\nresume: runs/a/c\n")
    )
    assert recipe.method == "rst"
    assert (recipe.epochs, type(recipe.epochs)) == (2.0, float)
    assert recipe.lr == 5e-4  # YAML 1.1 reads this as text
    assert recipe.targets == ("q_proj", "v_proj")
    assert recipe.steps is None
    assert recipe.resume == "runs/a/c"
    assert load_recipe(recipe_file("resume: true")).resume is True


def test_a_later_file_overrides_an_earlier_one(recipe_file):
    base = recipe_file("rank: 8\nlr: 0.1\n", "base.yaml")
    assert load_recipe(base, recipe_file("rank: 4\n")) == Recipe(rank=4, lr=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\n\nmethd: ist\n", "r.yaml:3: unknown key 'methd'; did you mean 'method'?"),
        ("learning_rate: 1\n", "r.yaml:1: unknown key 'learning_rate'; did you mean 'lr'?"),
        ("zzzz: 1\n", "r.yaml:1: unknown key 'zzzz'; `siftune train --help` lists the keys"),
        ("# c\nrank: eight\n", "r.yaml:2: rank must be a whole number or nothing, not 'eight' (str)"),
        ("rank: 8.0\n", "r.yaml:1: rank must be a whole number or nothing, not 8.0 (float)"),
        ("rank: true\n", "r.yaml:1: rank must be a whole number or nothing, not True (bool)"),
        ("lr: fast\n", "r.yaml:1: lr must be a number or nothing, not 'fast' (str)"),
        ("lr: true\n", "r.yaml:1: lr must be a number or nothing, not True (bool)"),
        ("steps: many\n", "r.yaml:1: steps must be a whole number or nothing, not 'many' (str)"),
        ("method: lsa\n", f"r.yaml:1: method must be one of {', '.join(METHODS)}, not 'lsa' (str)"),
        ("targets: 3\n", "r.yaml:1: targets must be a list of names or nothing, not 3 (int)"),
        ("layers: [0, x]\n", "r.yaml:1: layers must be a list, each a whole number or nothing, not [0, 'x'] (list)"),
        ("targets: [1]\n", "r.yaml:1: targets must be a list of names or nothing, not [1] (list)"),
        ("checkpointing: 1\n", "r.yaml:1: checkpointing must be true or false, not 1 (int)"),
        ("train: 7\n", "r.yaml:1: train must be text or a list of names, not 7 (int)"),
        ("model:\n  name: x\n", "r.yaml:1: model must be text, not {'name': 'x'} (dict)"),
        ("- model\n", "r.yaml:1: a recipe is made of lines `key: value`"),
        ("lr: 1\nrank: 2\nlr: 3\n", "r.yaml:3: lr is given twice, first in line 1"),
        ("lr: 1\nrank: [2\n", "r.yaml:3: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("lr: 1\n? [a]\n: 2\n", "r.yaml:2: a recipe is made of lines `key: value`"),
        ("yes: 1\n", "r.yaml:1: unknown key 'yes'"),
        ("gast: 3\n", "r.yaml:1: gast must hold options of its own, each on a line of its own, not 3 (int)"),
        ("gast:\n  select: all\n", "r.yaml:2: gast.select must be a whole number or a number, not 'all' (str)"),
        ("gast:\n  selct: 3\n", "r.yaml:2: unknown key 'gast.selct'; did you mean 'select'?"),
        ("gast:\n  seed: 3\n", "r.yaml:2: unknown key 'gast.seed'"),
        ("gast:\n  select: 3\n  select: 4\n", "r.yaml:3: select is given twice, first in line 2"),
        ("greats: {temperature: 1.0}\n", "r.yaml:1: unknown key 'greats.temperature'"),
        (b"model: \xff\n", "r.yaml is not UTF-8 text: byte 7 is invalid"),
        ("model: \x00\n", "r.yaml: not valid YAML:"),
        ("model: &a x\ntrain: *a\n", "r.yaml:2: not valid YAML: aliases such as *name are not for recipes"),
        ("gast: &a {select: *a}\n", "r.yaml:1: not valid YAML: aliases such as"),
        ("model: 2024-13-45\n", "r.yaml: not valid YAML: month must be in 1..12"),
        (f"seed: {'9' * 5000}\n", "r.yaml: not valid YAML: Exceeds the limit"),
        (f"train: {'[' * 3000}\n", "r.yaml: nested too deeply for a recipe"),
    ],
)
def test_a_mistake_is_told_with_file_line_and_remedy(recipe_file, text, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_opened(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe .*no\.yaml does not exist \(looked in "):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)


def test_a_written_recipe_reads_back_as_it_was(recipe_file):
    recipe = resolve_recipe(
        Recipe(train="ü: #.jsonl", targets=("a", "b"), layers=(0, -1), lr=1e-5, resume=True, eval=None)
    )
    assert load_recipe(recipe_file(recipe_to_yaml(recipe))) == recipe


def test_resolving_fills_in_what_depends_on_other_fields():
    now = datetime(2025, 3, 4, 5, 6, 7)
    recipe = resolve_recipe(Recipe(rank=8, method="rst"), now)
    assert (recipe.alpha, recipe.out) == (16, "runs/20250304-050607-rst")
    assert resolve_recipe(Recipe(adapter="full"), now).alpha is None
    assert resolve_recipe(Recipe(out="~/runs/a"), now).out == str(Path.home() / "runs" / "a")
    given = Recipe(rank=5, alpha=3, out="here", lr=1e-4)
    assert resolve_recipe(given, now) == given


@pytest.mark.parametrize("method", METHODS)
def test_the_method_decides_the_learning_rate_where_none_is_given(method):
    assert resolve_recipe(Recipe(method=method)).lr == METHODS[method].lr
    assert resolve_recipe(Recipe(method=method, lr=3e-5)).lr == 3e-5
    words = help_of(Recipe)["lr"]
    assert f"{rate_text(METHODS[method].lr)} for" in words or METHODS[method].lr == METHODS["dense"].lr
    assert words.endswith(f"else {rate_text(METHODS['dense'].lr)}.")


def test_a_plain_recipe_passes_the_check():
    check(Recipe(train="rows.jsonl"))
    ist = ISTSettings(active=1.0)
    check(resolve_recipe(Recipe(train="rows.jsonl", method="ist", ist=ist, clip=0, warmup=0, seed=0, dropout=0)))


@pytest.mark.parametrize("method", METHODS)
def test_a_target_goes_with_every_method(tmp_path, method):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"train: rows.jsonl\ntarget: few.jsonl\nmethod: {method}\n")
    recipe = load_recipe(file)
    check(recipe)
    assert compared_with(recipe) == ("few.jsonl" if "gast" in method or method == "greats" else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ""}, "no training data: give --train FILE"),
        ({"lr": 0.0}, "lr is 0.0, but must be above 0"),
        ({"lr": float("nan")}, "lr is nan, but must be a finite number"),
        ({"epochs": float("inf")}, "epochs is inf, but must be a finite number"),
        ({"rank": 0}, "rank is 0, but must be 1 or more"),
        ({"alpha": 0}, "alpha is 0, but must be above 0"),
        ({"dropout": 1.0}, "dropout is 1.0, but must be from 0 to below 1"),
        ({"warmup": -0.1}, "warmup is -0.1, but must be a whole number of steps, or a fraction from 0 to below 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, but must be 0 or more"),
        ({"clip": -1.0}, "clip is -1.0, but must be 0 or more"),
        ({"max_length": 1}, "max_length is 1, but must be 2 or more"),
        ({"seed": 2**32}, "seed is 4294967296, but must be from 0 to 4294967295"),
        ({"save_every": 0}, "save_every is 0, but must be 1 or more"),
        ({"limit": 0}, "limit is 0, but must be 1 or more"),
        ({"eval_every": 5}, "eval_every needs held-out rows"),
        ({"resume": True}, "resume needs the run folder"),
        ({"targets": ()}, "targets is empty"),
        ({"layers": ()}, "layers is empty: give at least one number"),
        ({"method": "gast", "gast": GASTSettings(support="dataset")}, "support dataset compares rows with a target's"),
        (
            {"target": "a", "target_share": 0.0, "target_last": 0.5},
            "target_last says when a target's rows come, but with target_share 0",
        ),
        ({"target_last": 0.5}, "target_last has no effect without a target"),
        ({"target": "a", "group_by_length": True}, "group_by_length puts rows in an order of its own, but a target's"),
        (
            {"target": "a", "method": "gast"},
            "with a target, rows are compared with its rows, by support dataset",
        ),
        ({"target_share": 1.0}, "target_share is 1.0, but must be from 0 to below 1"),
        (
            {"gast": GASTSettings(select=8)},
            "gast.select is 8, which has no effect with method dense: leave it out, or take --method gast or ist+gast",
        ),
        (
            {"method": "dense", "ist": ISTSettings(interval=5)},
            "ist.interval is 5, which has no effect with method dense: leave it out, or take --method ist or ist+gast",
        ),
    ],
)
def test_check_refuses(change, message):
    with pytest.raises(RecipeError) as caught:
        check(replace(Recipe(train="rows.jsonl"), **change))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("kind", [Recipe, *(part.settings for part in all_parts())], ids=lambda kind: kind.__name__)
def test_every_number_has_a_range_and_every_setting_a_line_of_help(kind):
    groups = {part.settings.group for part in all_parts()}
    names = [f.name for f in fields(kind) if f.name not in groups]
    hints = get_type_hints(kind)
    for name in names:
        if get_origin(hints[name]) is not tuple and {int, float} & {hints[name], *get_args(hints[name])}:
            assert any(isinstance(mark, Range) for mark in marks_of(kind, name)), name
    documented = help_of(kind if kind is not Recipe else Recipe.__mro__[1])
    assert list(documented) == names
    assert all(line.endswith(".") for line in documented.values())


def test_a_recipe_has_the_settings_of_every_method():
    recipe = Recipe()
    for name in METHODS:
        assert settings_of(replace(recipe, method=name)) == [part.settings() for part in METHODS[name].parts]


def test_a_recipe_written_holds_the_settings_of_its_method_alone():
    text = recipe_to_yaml(Recipe(method="ist+gast"))
    assert "\nist:\n  active: 0.25\n" in text
    assert "\ngast:\n  select: 0.75\n" in text
    assert "lisa" not in text
    assert "greats" not in text


def test_a_later_file_adds_to_the_settings_of_an_earlier_one(recipe_file):
    base = recipe_file("method: gast\ngast:\n  select: 8\n  support: rest\n", "base.yaml")
    recipe = load_recipe(base, recipe_file("gast: {support: momentum}\n"))
    assert recipe.gast == GASTSettings(select=8, support="momentum")


def test_settings_of_the_wrong_type_are_refused():
    for settings, words in (({"interval": 2.5}, "a whole number or nothing"), ({"active": "half"}, "a number")):
        with pytest.raises(RecipeError, match=f"but must be {words}"):
            ISTSettings(**settings)
    with pytest.raises(RecipeError, match=r"lisa\.interval is True, but must be a whole number"):
        LISASettings(interval=True)


def test_nearest_knows_the_names_of_other_trainers():
    names = [f.name for f in fields(Recipe)]
    assert nearest("select", ["lr", "gast.select", "greats.select"]) == "gast.select or greats.select"
    assert nearest("per-device-train-batch-size", names) == "batch_size"
    assert nearest("Epoch", names) == "epochs"
    assert nearest("qqqqq", names) is None
    assert set(ELSEWHERE.values()) <= set(names)


@pytest.mark.parametrize(
    ("change", "last", "until"),
    [
        ({}, 0.33, 0.67),
        ({"target_last": 0.5}, 0.5, 0.5),
        ({"target_share": 0.4}, 0.33, 0.6),
        ({"target_last": 1.0}, 1.0, 1.0),
        ({"target_share": 0.0}, 1.0, 1.0),
        ({"target_share": 0.0, "group_by_length": True}, 1.0, 1.0),
        ({"method": "dense"}, 0.33, 0.67),
        ({"method": "greats"}, 1.0, 1.0),
    ],
)
def test_rows_are_selected_until_a_targets_come(change, last, until):
    recipe = resolve_recipe(replace(Recipe(train="rows.jsonl", **_FEW), **change))
    assert (recipe.target_last, select_until(recipe)) == (last, until)
    check(recipe)


def test_recipes_do_not_import_torch():
    code = "import sys, siftune.recipe.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


_AIMED = GASTSettings(**GASTSettings.with_target)
# what is not a default in the recipes that are not named after their method
OWN = {
    "kit": {"model": "KIT", "method": "dense"},
    "parallel": {"method": "dense", "adapter": "parallel"},
    "gast-paper": {"method": "gast", "gast": GASTSettings(select=0.5)},
    "target": {**_FEW, "gast": _AIMED, "target_last": 0.33},
}
RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_shows_the_defaults(path):
    recipe = load_recipe(path)
    check(recipe)
    # a recipe shows the defaults, so that they can be learned from it
    assert recipe.lr == METHODS[recipe.method].lr
    assert recipe.rank in (None, ADAPTER_TYPES[recipe.adapter].rank)
    shown = replace(recipe, train="", save_every=None, lr=None, rank=None)
    assert shown == Recipe(**OWN.get(path.stem, {"method": path.stem}))
