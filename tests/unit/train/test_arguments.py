"""A recipe in the Trainer's words."""

import logging

from transformers import TrainingArguments

from siftune.recipe.schema import Recipe
from siftune.train.build import training_arguments


def test_one_gpu_of_several_is_used(tmp_path, monkeypatch, caplog):
    """Otherwise the Trainer copies the model to all of them."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 3))
    with caplog.at_level(logging.WARNING, logger="siftune"):
        arguments = training_arguments(Recipe(), tmp_path, fp16=False)
    assert arguments._n_gpu == 1
    assert "3 GPUs are there, the first is used" in caplog.text
