"""Embeddings against a pass over each row by itself, and choices by hand."""

import pytest
import torch
from datasets import Dataset
from support.tiny import tiny

from lab.pays.embeddings import embed, most_alike, similarity
from siftune.base.errors import UnsupportedError
from siftune.data.batches import Collator


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_are_means_over_real_tokens(family):
    model = tiny(family).double().train()
    rows = [[5, 9, 11, 40], [7, 8], [3, 3, 60]]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "length": [4, 2, 3]})
    found = embed(model, data, Collator(0), batch_size=2)
    assert model.training
    for vector, ids in zip(found, rows, strict=True):
        with torch.no_grad():
            states = model.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(vector, states.mean(0) / states.mean(0).norm(), rtol=1e-12, atol=1e-12)


def test_a_model_that_does_not_tell_what_is_below_its_head_is_refused(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model), "base_model_prefix", "")
    with pytest.raises(UnsupportedError, match="does not tell which module its head is on"):
        embed(model, Dataset.from_dict({"input_ids": [[5]], "labels": [[5]], "length": [1]}), Collator(0))


def test_similarity_and_choice_by_hand():
    pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(similarity(pool, known), torch.tensor([1.0, 1.0, 0.8, 0.0]))
    scores = torch.tensor([0.0, 5, 1, 2, 9, 3, 4, 0])
    assert most_alike(scores, 0.25) == [1, 4]
    assert most_alike(scores, 0.01) == [4]
    assert most_alike(torch.ones(4), 0.5) == [0, 1]
