"""Embeddings against a pass over each text by itself, and similarities by hand."""

import numpy as np
import pytest
import torch
from support.tiny import tiny

from siftune.sifting.similarity import embed, least_similarity, nearest, nearest_other, prompt_of, task_limit


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_are_means_over_real_tokens(family):
    model = tiny(family).double().train()
    texts = [[5, 9, 11, 40], [7, 8], [3, 3, 60]]
    vectors = embed(model, texts, batch_size=2)
    assert model.training
    for vector, ids in zip(vectors, texts, strict=True):
        with torch.no_grad():
            states = model.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(vector, states.mean(0) / states.mean(0).norm(), rtol=1e-12, atol=1e-12)


def test_a_completion_does_not_change_the_similarity():
    rows = [([5, 6, 7], [-100, -100, 7]), ([5, 6, 9, 9], [-100, -100, 9, 9])]
    prompts = [prompt_of(*row) for row in rows]
    assert prompts == [[5, 6], [5, 6]]
    one, other = embed(tiny("llama").double(), prompts)
    torch.testing.assert_close(one, other)


def test_similarity_by_hand():
    mean = torch.tensor([10.0, -3.0])
    texts = mean + torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [-1.0, 0.0]])
    target = mean + torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(nearest(texts, target, mean), torch.tensor([1.0, 1.0, 0.8, 0.0]))
    torch.testing.assert_close(nearest(texts, target[:1], mean), torch.tensor([1.0, 0.0, 0.6, -1.0]))


def test_similarity_of_the_targets_own_texts_leaves_each_text_itself_out():
    mean = torch.tensor([10.0, -3.0])
    target = mean + torch.tensor([[5.0, 0.0], [0.0, 1.0], [3.0, 4.0], [0.0, 9.0]])
    torch.testing.assert_close(nearest_other(target, mean), torch.tensor([0.6, 1.0, 0.8, 1.0]))


def test_a_single_text_of_the_target_is_like_itself():
    assert nearest_other(torch.tensor([[0.6, 0.8]]), torch.zeros(2)).tolist() == [1.0]


def test_equal_prompts_are_of_the_task_up_to_rounding():
    assert 0.99 < least_similarity(np.array([1.0, 1.0])) < 1 - 1e-6


@pytest.mark.parametrize(("count", "outside"), [(8, 1), (20, 1), (21, 1), (22, 2), (100, 5)])
def test_a_twentieth_of_the_targets_rows_and_at_least_one_do_not_set_the_limit(count, outside):
    own = np.linspace(0.5, 0.9, count)
    assert least_similarity(own) == own[outside]
    odd = np.where(np.arange(count) < outside, -1.0, own)
    assert least_similarity(odd) == own[outside]


def pool(*parts):
    """Similarities of a pool: (first, last, count) of each part, evenly spaced, in another order."""
    return np.random.default_rng(0).permutation(np.concatenate([np.linspace(*part) for part in parts]))


@pytest.mark.parametrize(
    ("parts", "limit"),
    [
        ([(-0.2, 0.4, 500), (0.5, 1.0, 500)], 0.5),
        ([(-0.2, 0.3, 500), (0.4, 0.6, 200), (0.7, 1.0, 500)], 0.7),  # the first gap below; not another task, too
        ([(-0.2, 0.3, 500), (0.32, 0.6, 200), (0.61, 1.0, 500)], 0.8),  # narrower than 0.04
        ([(-0.2, 0.4, 49), (0.5, 1.0, 951)], 0.8),  # odd rows below the gap
        ([(-0.2, 0.4, 50), (0.5, 1.0, 950)], 0.5),
        ([(-0.2, 0.4, 100), (0.5, 1.0, 100)], 0.8),  # a distance of 0.1 in a pool of 200 rows
        ([(-0.2, 0.4, 500), (0.85, 1.0, 500)], 0.8),  # no row between
    ],
)
def test_rows_above_the_first_clear_gap_below_the_limit_are_of_the_task(parts, limit):
    assert task_limit(pool(*parts), np.array([0.75, 0.8, 0.9])) == limit
