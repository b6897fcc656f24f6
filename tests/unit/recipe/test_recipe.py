"""Recipes: reading, resolving, and contradictions between options."""

import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from transformers.integrations import integration_utils

from siftune.base.errors import RecipeError
from siftune.base.settings import help_of
from siftune.methods import METHODS
from siftune.methods.options import GASTSettings, ISTSettings
from siftune.recipe.checks import TRACKERS, check
from siftune.recipe.read import anchored, load_recipe, recipe_to_yaml, without_folders
from siftune.recipe.schema import Recipe, compared_with, resolve_recipe, select_until, shape_of
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
    ("text", "words"),
    [
        ("model: m\n\nmethd: ist\n", ["r.yaml:3", "'methd'", "'method'"]),
        ("learning_rate: 1\n", ["r.yaml:1", "'lr'"]),
        ("zzzz: 1\n", ["r.yaml:1", "--help"]),
        ("# c\nrank: eight\n", ["r.yaml:2: rank is 'eight'", "integer"]),
        ("rank: 8.0\n", ["r.yaml:1: rank is 8.0"]),
        ("rank: true\n", ["r.yaml:1: rank is True"]),
        ("rank: 0\n", ["r.yaml:1: rank is 0", "at least 1"]),
        ("lr: fast\n", ["r.yaml:1: lr is 'fast'"]),
        ("lr: true\n", ["r.yaml:1: lr is True"]),
        ("lr: .nan\n", ["r.yaml:1: lr is nan"]),
        ("method: lsa\n", ["r.yaml:1: method is 'lsa'", "ist+gast"]),
        ("targets: 3\n", ["r.yaml:1: targets is 3"]),
        ("layers: [0, x]\n", ["r.yaml:1: layers is [0, 'x']"]),
        ("checkpointing: 1\n", ["r.yaml:1: checkpointing is 1"]),
        ("train: 7\n", ["r.yaml:1: train is 7"]),
        ("model:\n  name: x\n", ["r.yaml:1: model is {'name': 'x'}"]),
        ("- model\n", ["r.yaml:1"]),
        ("lr: 1\nrank: 2\nlr: 3\n", ["r.yaml:3", "lr", "line 1"]),
        ("lr: 1\nrank: [2\n", ["r.yaml:3", "YAML"]),
        ("lr: 1\n? [a]\n: 2\n", ["r.yaml:2"]),
        ("gast: 3\n", ["r.yaml:1: gast is 3"]),
        ("gast:\n  select: all\n", ["r.yaml:2: gast.select is 'all'"]),
        ("gast:\n  selct: 3\n", ["r.yaml:2", "gast.selct", "gast.select"]),
        ("gast:\n  select: 3\n  select: 4\n", ["r.yaml:3", "select", "line 2"]),
        ("method: gast\nselect: 3\n", ["r.yaml:2", "gast.select"]),
        (b"model: \xff\n", ["r.yaml", "byte 7"]),
        ("model: \x00\n", ["r.yaml", "YAML"]),
        ("model: &a x\ntrain: *a\n", ["r.yaml:2", "aliases"]),
        ("gast: &a {select: *a}\n", ["r.yaml:1", "aliases"]),
        ("model: 2024-13-45\n", ["r.yaml", "month"]),
        (f"seed: {'9' * 5000}\n", ["r.yaml", "limit"]),
        (f"train: {'[' * 3000}\n", ["r.yaml", "nested"]),
    ],
)
def test_an_error_names_file_line_and_key(recipe_file, text, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(text))
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_opened(tmp_path):
    with pytest.raises(RecipeError, match=r"no\.yaml does not exist"):
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


def test_the_adapter_has_the_shape_that_the_recipe_asks_for():
    options = {"rank": 3, "alpha": 5, "dropout": 0.25, "targets": ("q_proj",), "layers": (0, -1)}
    assert options.items() <= vars(shape_of(Recipe(**options))).items()


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
    assert compared_with(recipe) == ("few.jsonl" if "gast" in method else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ""}, "no training data: give --train FILE"),
        ({"eval_every": 5}, "eval_every"), ({"resume": True}, "resume"), ({"targets": ()}, "targets"),
        ({"layers": ()}, "layers"), ({"method": "gast", "gast": GASTSettings(support="dataset")}, "support dataset"),
        ({"target": "a", "target_share": 0.0, "target_last": 0.5}, "target_last says"),
        ({"target_last": 0.5}, "target_last has no effect"),
        ({"from_adapter": "run", "dp_epsilon": 8.0, "dp_delta": 1e-5}, "dp_epsilon"),
        ({"target": "a", "group_by_length": True}, "group_by_length"),
        ({"target": "a", "method": "gast"}, "with a target"),
        (
            {"gast": GASTSettings(select=8)},
            "gast.select is 8, which has no effect with method dense: leave it out, or take --method gast or ist+gast",
        ),
        ({"method": "dense", "ist": ISTSettings(interval=5)}, "ist.interval is 5"),
    ],
)  # fmt: skip
def test_check_refuses(change, message):
    with pytest.raises(RecipeError) as caught:
        check(replace(Recipe(train="rows.jsonl"), **change))
    assert str(caught.value).startswith(message)


def test_a_recipe_written_holds_the_settings_of_its_method_alone():
    text = recipe_to_yaml(Recipe(method="ist+gast"))
    assert "\nist:\n  active: 0.25\n" in text
    assert "\ngast:\n  select: 0.75\n" in text
    assert "\nrst:" not in text


def test_a_later_file_adds_to_the_settings_of_an_earlier_one(recipe_file):
    base = recipe_file("method: gast\ngast:\n  select: 8\n  support: rest\n", "base.yaml")
    recipe = load_recipe(base, recipe_file("gast: {support: sample}\n"))
    assert recipe.gast == GASTSettings(select=8, support="sample")


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
    ],
)
def test_rows_are_selected_until_a_targets_come(change, last, until):
    recipe = resolve_recipe(replace(Recipe(train="rows.jsonl", **_FEW), **change))
    assert (recipe.target_last, select_until(recipe)) == (last, until)
    check(recipe)


def test_recipes_do_not_import_torch():
    code = "import sys, siftune.recipe.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_target_that_is_a_file_of_the_training_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="also a file of the training rows"):
        check(Recipe(train=("a.jsonl", "b.jsonl"), target="./b.jsonl"))


def test_a_setting_without_effect():
    with pytest.raises(RecipeError, match=r"gast\.support_size"):
        GASTSettings(support="rest", support_size=3)


def test_a_split_stays_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "two").mkdir(parents=True)
    recipe = anchored(Recipe(train=("data/two@test", "org/rows@test"), eval="data/two"))
    assert recipe.train == (f"{tmp_path}/data/two@test", "org/rows@test")
    assert recipe.eval == f"{tmp_path}/data/two"
    assert without_folders(recipe).train == ("two@test", "org/rows@test")


def test_trackers_are_those_of_transformers():
    assert sorted(TRACKERS) == sorted(integration_utils.INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tensorbord",), "report_to has the unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        (("tensorboard,wandb",), "report_to has 'tensorboard,wandb': put spaces between trackers, not commas"),
        (("mlflow", "zzz"), "report_to has the unknown tracker 'zzz'; use one of azure_ml,"),
        (("none", "mlflow"), "report_to names trackers, or none and nothing else"),
        ((), "report_to names trackers, or none and nothing else"),
    ],
)
def test_names_of_trackers_that_are_refused(names, message):
    check(Recipe(train="rows.jsonl", report_to=("tensorboard", "mlflow")))
    with pytest.raises(RecipeError) as caught:
        check(Recipe(train="rows.jsonl", report_to=names))
    assert message in str(caught.value)
