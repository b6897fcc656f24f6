"""Every protocol is by the papers' settings, is a recipe that trains, and prints no figure that has no source."""

import pytest
import yaml

from lab.reproduce.protocol import names, protocol_of, recipe_files, sources
from siftune.base.errors import RecipeError
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe

PAPERS = {
    "rank": 32, "alpha": 64, "dropout": 0.05, "batch_size": 16, "epochs": 3, "warmup": 100, "max_length": 256,
    "adapter": "lora", "schedule": "linear", "completion_only": False, "template": "none",
}  # fmt: skip
OFFSITE = {
    "rank": None, "batch_size": 32, "epochs": 5, "warmup": 0, "max_length": 1024, "adapter": "full", "targets": None,
    "completion_only": True, "template": "none",
}  # fmt: skip
SMALL = {"steps": 120, "warmup": 12}  # ours, where no paper has the model
TARGETS = {
    "llama": ("up_proj", "down_proj"), "gpt": ("fc_in", "fc_out"), "opt": ("fc1", "fc2"),
    "smoll": ("up_proj", "down_proj"), "gemma": ("up_proj", "down_proj"),
}  # fmt: skip
AVERAGES = {  # as the sources print them
    "commonsense-gpt-j-6b": [59.0, 59.0, 50.2], "commonsense-llama-7b": [70.8, 72.3, 74.7, 76.3, 78.4],
    "commonsense-llama-13b": [79.5, 81.5, 80.5], "commonsense-llama3-8b": [80.8, 85.2],
    "math-gpt-j-6b": [39.6, 39.0, 41.1], "math-llama-7b": [44.6, 46.4, 46.9], "math-llama-13b": [48.9, 50.2, 51.1],
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_a_protocol_has_the_papers_settings_and_can_train(name):
    protocol = protocol_of(name)
    recipe = protocol.recipe
    suite, _, model = name.partition("-")
    wanted = OFFSITE if suite == "gradot" else PAPERS
    if model in ("smollm2", "gemma3-270m"):
        wanted = wanted | (SMALL if suite != "gradot" else {"steps": 120})
    assert {field: getattr(recipe, field) for field in wanted} == wanted
    if suite != "gradot":
        modules = next(value for key, value in TARGETS.items() if model.startswith(key))
        assert recipe.targets == ("q_proj", "k_proj", "v_proj", *modules)
    assert 5e-5 <= recipe.lr <= 1e-3
    assert set(protocol.suite.tables) == set(protocol.suite.tasks)
    assert set(protocol.suite.rows) == ({protocol.suite.joint} if protocol.suite.joint else set(protocol.suite.tasks))
    check(Recipe(**{**vars(recipe), "train": "rows.jsonl"}))
    lines = {key for file in recipe_files(name) for key in yaml.safe_load(file.read_text())}
    changed = {key for key, value in vars(recipe).items() if value != getattr(Recipe(), key)}
    assert changed <= lines


@pytest.mark.parametrize("name", names())
def test_printed_figures_have_a_source_and_the_average_that_it_prints(name):
    printed = protocol_of(name).printed
    assert all(row.source in sources() for row in printed)
    averages = [sum(row.right.values()) / len(row.right) for row in printed]
    assert averages == pytest.approx(AVERAGES.get(name, []), abs=0.11)


def test_a_recipe_stands_in_the_place_of_the_papers(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("adapter: dora\nrank: 16\n")
    recipe = protocol_of("math-llama-7b", str(own)).recipe
    assert (recipe.adapter, recipe.rank, recipe.alpha) == ("dora", 16, 64)


def test_a_name_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"no protocol 'commonsense-lama-7b'; did you mean commonsense-llama-7b\?"):
        protocol_of("commonsense-lama-7b")
