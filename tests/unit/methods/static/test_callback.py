"""Static: those layers and no others."""

import pytest
import torch
from support.tiny import batch
from support.trainers import Watch, adapted, train, weights

from siftune import Static
from siftune.base.errors import InputError, LayerError, RecipeError


def layers_of(names):
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


@pytest.mark.parametrize(
    ("numbers", "layers"), [((-1,), {3}), ((0, 2), {0, 2}), ((2, 0), {0, 2}), ((-2, -1), {2, 3}), ((1, -4), {0, 1})]
)
def test_those_layers_alone_change(tmp_path, numbers, layers):
    _, trainer = train(tmp_path, Static(numbers=numbers))
    watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))
    assert [layers_of(names) for names in watch.changed] == [layers] * 6
    assert [layers_of(names) for names in watch.with_grad] == [layers] * 6


def test_a_plain_loop_trains_them_and_the_numbers_ascend():
    model = adapted()
    before = weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with Static(numbers=(-1, 1)).attach(model, optimizer=optimizer) as sift:
        for _ in range(3):
            assert sift.last.layers == (1, 3)
            model(**batch(model)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert layers_of(n for n, value in weights(model).items() if not torch.equal(value, before[n])) == {1, 3}


def test_numbers_are_those_of_the_model_not_of_the_adapted_layers():
    model = adapted(targets=["layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj"])
    with Static(numbers=(3,)).attach(model) as sift:
        assert sift.last.layers == (3,)


@pytest.mark.parametrize(("numbers", "missing"), [((2,), 2), ((1, -4), 0)])
def test_a_layer_without_adapters_is_refused_by_name(numbers, missing):
    model = adapted(targets=["layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj"])
    with pytest.raises(LayerError, match=rf"names layer {missing}, which has nothing to train; .*others: 1, 3"):
        Static(numbers=numbers).attach(model)


@pytest.mark.parametrize("number", [4, -5])
def test_a_layer_that_does_not_exist_is_refused_by_name(number):
    with pytest.raises(InputError, match=rf"has 4 layers, so `static\.numbers` takes .* found {number}$"):
        Static(numbers=(0, number)).attach(adapted())


def test_no_layer_is_refused():
    with pytest.raises(RecipeError, match=r"static\.numbers is empty"):
        Static(numbers=())


def test_a_list_of_numbers_is_as_good():
    assert Static(numbers=[1, -1]).numbers == (1, -1)
    with pytest.raises(RecipeError, match=r"static\.numbers is 3, but must be a list, each a whole number"):
        Static(numbers=3)
