"""Runs that 0.1 left: recipes, states in checkpoints, and folders, in the form in which it wrote them.

What the states must lead to is what 0.1 itself went on with: the numbers below were printed by it.
"""

import base64
import json

import pytest
import torch
from safetensors.torch import save_file
from support.adapted import adapted
from support.of_0_1 import RECIPE
from support.tiny import batch, tiny

from siftune import GAST, IST, RST
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.train.tuned_layers import put_in, read_about, read_tuned

ABOUT = '{"base": "base", "layers": [1]}\n'
PREFIX = "base_model.model.model.layers"
BY_IMPORTANCE = [(2, 3), (0, 3), (0, 3), (0, 3), (1, 3), (0, 2)]
AT_RANDOM = [(2, 3), (0, 1), (0, 1), (0, 3), (1, 3), (0, 1)]
ROWS = [[1, 4], [0, 3], [2, 3], [1, 3]]

DEFAULTS = {"active": 0.25, "select": 0.75, "decay": 0.9}


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("dense", {}),
        ("rst", {"active": 0.5}),
        ("ist", {"active": 0.5}),
        ("gast", {"select": 2, "decay": 0.8}),
        ("ist+gast", {"active": 0.5, "select": 2, "decay": 0.8}),
    ],
)
def test_every_key_of_a_recipe_is_read(tmp_path, method, given):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(method=method, **{**DEFAULTS, **given}))
    recipe = load_recipe(path)
    check(recipe)
    assert (recipe.method, recipe.rank, recipe.alpha, recipe.lr, recipe.steps) == (method, 4, 8, 0.01, 8)
    if method != "dense":
        layers, rows = getattr(recipe, method.partition("+")[0]), recipe.gast
        read = {name: getattr(layers if name == "active" else rows, name) for name in given}
        assert read == given


def state(**values):
    """A callback's state as it stood in trainer_state.json; the generator's is base64 of its bytes."""
    bits = torch.Generator().manual_seed(7).get_state()
    return {"generator": base64.b64encode(bytes(bits.tolist())).decode(), "steps": 3, "taken": 0, **values}


def layers_of_steps(selection, saved, steps=6):
    with selection:
        selection.load_state_dict(json.loads(json.dumps(saved)))
        return [selection.step().layers for _ in range(steps)]


def test_layers_by_importance_go_on_as_they_would_have():
    saved = state(importance=[0.5, -4.0, 0.25, 4.0], layers=[1, 3])
    sift = IST(active=0.5, interval=None).attach(adapted())
    assert layers_of_steps(sift, saved) == BY_IMPORTANCE
    assert sift.importance.tolist() == saved["importance"]


def test_layers_at_random_go_on_as_they_would_have():
    saved = state(importance=[0.0] * 4, layers=[1, 3])  # 0.1 kept an importance here, which nothing ever moved
    assert layers_of_steps(RST(active=0.5).attach(adapted()), saved) == AT_RANDOM


def test_rows_go_on_as_they_would_have():
    model = adapted()
    with GAST(select=2, support="rest", choice="random").attach(model) as sift:
        sift.load_state_dict(state(passes=1))
        model(**batch(model, rows=5)).loss.backward()
        assert sift.last.selected.tolist() == ROWS


def test_a_running_mean_is_found_by_its_names():
    model = adapted(targets=["q_proj"])
    names = [f"{PREFIX}.{i}.self_attn.q_proj.lora_{x}.default.weight" for i in range(4) for x in "AB"]
    parameters = dict(model.named_parameters())
    mean = {name: torch.full_like(parameters[name], float(i)) for i, name in enumerate(names)}
    with GAST(support="momentum").attach(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as sift:
        sift.load_mean_tensors(mean)
        assert {name: t.mean().item() for name, t in sift.mean_tensors().items()} == dict(
            zip(names, range(8), strict=True)
        )


def test_layers_that_were_tuned_themselves_are_put_in(tmp_path):
    model = tiny("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    wanted = {n: torch.full_like(p, 0.5) for n, p in model.named_parameters() if n.startswith("model.layers.1.")}
    save_file(wanted, tmp_path / "tuned_layers.safetensors")
    (tmp_path / "tuned_layers.json").write_text(ABOUT)
    assert read_about(tmp_path).layers == (1,)
    put_in(model, read_tuned(tmp_path), str(tmp_path))
    assert torch.equal(model.get_parameter(name), wanted[name])
