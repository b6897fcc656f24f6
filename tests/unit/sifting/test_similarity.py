"""Embeddings against a pass over each text by itself, and similarities by hand."""

import pytest
import torch
from support.tiny import tiny

from siftune.sifting.similarity import embed, nearest, prompt_of


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
